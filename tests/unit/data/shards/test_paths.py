from __future__ import annotations

import time
from pathlib import Path

import pytest

from m2_encoder.data.shards.paths import find_files, list_shards
from m2_encoder.errors import UserError
from tests.support.shards import write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.tar", "a.tar", "note.txt", "c.TAR"):
        (tmp_path / name).touch()
    (tmp_path / "sub.tar").mkdir()
    return tmp_path


def _find(source: str | list[str]) -> list[str]:
    return [path.name for path in find_files(source, suffixes=(".tar",), what="shard")]


def test_forms(folder: Path) -> None:
    assert _find(str(folder)) == ["a.tar", "b.tar", "c.TAR"]
    assert _find(f"{folder}/[ab].tar") == ["a.tar", "b.tar"]
    assert _find(f"{folder}/{{b,a,gone}}.tar") == ["b.tar", "a.tar", "gone.tar"]
    assert _find(f"{folder}/b.tar") == ["b.tar"]
    assert _find([f"{folder}/b.tar", f"{folder}/a*"]) == ["b.tar", "a.tar"]


@pytest.mark.parametrize(
    ("source", "message"), [("gone", "no such file"), ("*.zip", "no file fits"), ([], "no shard given")]
)
def test_nothing_there(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        _find(source)


def test_folder_without_shards_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"no \*\.tar there; it holds thesis\.txt"):
        _find(str(tmp_path))


def test_shards_by_braces_glob_folder_list_and_url(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "note.txt"):
        (tmp_path / name).touch()

    def names(shards: str | list[str]) -> list[str]:
        return [Path(s).name for s in list_shards(shards)]

    assert names(f"{tmp_path}/a-{{0..1}}.tar") == ["a-0.tar", "a-1.tar"]
    assert names(f"{tmp_path}/{{b,a}}-0.tar") == ["b-0.tar", "a-0.tar"]
    assert names(f"{tmp_path}/a-*.tar") == ["a-0.tar", "a-1.tar"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c-0.tar").touch()
    assert names(f"{tmp_path}/{{more,b-0.tar}}") == ["c-0.tar", "b-0.tar"]
    assert names(str(tmp_path)) == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert names([f"{tmp_path}/b-*.tar", f"file://{tmp_path}/a-0.tar"]) == ["b-0.tar", "a-0.tar"]
    urls = list_shards("s3://bucket/x/{00..02}.tar?v=1")
    assert urls == [f"s3://bucket/x/0{i}.tar?v=1" for i in range(3)]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{folder}/none-*.tar", "no file fits"),
        (["{folder}/a.tar", "{folder}/*.tar"], "a.tar comes twice"),
        (["{folder}/a.tar", "{folder}/../{folder.name}/a.tar"], "a.tar comes twice"),
        (["{folder}/a.tar", "file://{folder}/./a.tar"], "a.tar comes twice"),
        ("{folder}/{{0..1", "0..1: its braces cannot be read"),
        ("{folder}/${{NOBODY_SET_THIS}}.tar", "its braces cannot be read"),
        ("pipe:cat {folder}/a.tar", "cannot be read by offset"),
    ],
)
def test_impossible_shards_are_named(tmp_path: Path, shards: str | list[str], message: str) -> None:
    (tmp_path / "a.tar").touch()
    given = [s.format(folder=tmp_path) for s in ([shards] if isinstance(shards, str) else shards)]
    with pytest.raises(UserError, match=message):
        list_shards(given)


@pytest.mark.parametrize("name", ["{x", "a::b", "a\\b", "{a,b}", "[1]", "ü 图=片"])
def test_what_is_there_by_its_full_name_needs_no_quoting(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    shard = tmp_path / name / f"{name}.tar"
    shard.touch()
    for given in (shard, shard.parent):
        assert list_shards(str(given)) == [str(shard)]


def test_a_shard_twice_among_many_is_found_at_once() -> None:
    shards = ["/data/{0..59999}.tar"]
    started = time.process_time()
    with pytest.raises(UserError, match=r"/data/59999\.tar comes twice"):
        list_shards([*shards, "/data/{59999..59999}.tar"])
    assert time.process_time() - started < 5


def test_what_systems_leave_behind_is_no_shard(tmp_path: Path) -> None:
    for name in ("0.tar", "._0.tar", "__MACOSX/0.tar"):
        write_tar(tmp_path / name, [])
    assert list_shards(str(tmp_path)) == [str(tmp_path / "0.tar")]
    assert list_shards(f"{tmp_path}/*.tar") == [str(tmp_path / "0.tar")]
    assert list_shards(f"{tmp_path}/**/*.tar") == [str(tmp_path / "0.tar")]
