from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.data.shards.paths import find_files
from m2_encoder.errors import UserError


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
    assert _find(f"{folder}/*.tar") == ["a.tar", "b.tar"]
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
