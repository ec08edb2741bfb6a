from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.curation.sources import list_shards
from m2_encoder.errors import UserError


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for name in ("a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1024))
    (tmp_path / "a" / "readme.txt").write_text("no tar")
    return tmp_path


def test_numbers_follow_sources_and_names(tars: Path) -> None:
    shards = list_shards({"second": str(tars / "b"), "first": str(tars / "a")}, {"first": "zh"})
    assert [shard.number for shard in shards] == [0, 1, 2, 3]
    assert [shard.source for shard in shards] == ["second", "first", "first", "first"]
    assert [shard.language for shard in shards] == [None, "zh", "zh", "zh"]
    assert [Path(shard.path).name for shard in shards] == ["000.tar", "000.tar", "001.tar", "010.tar"]
    assert shards[0].size == 1024


@pytest.mark.parametrize("pattern", ["a/*.tar", "a/{000,001,010}.tar", ["a/000.tar", "a/001.tar", "a/010.tar"], "a"])
def test_ways_to_name_shards(tars: Path, pattern: str | list[str]) -> None:
    parts = [str(tars / part) for part in ([pattern] if isinstance(pattern, str) else pattern)]
    assert len(list_shards({"main": parts})) == 3


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "no sources"),
        ({"main": "c"}, "no such file or folder"),
        ({"main": "a/{000..002}.tar"}, "no such tar"),
        ({"main": "a", "other": "a/000.tar"}, "is in the sources main and other"),
        ({"a/b": "a"}, "use letters"),
        ({"decisions": "a"}, "use letters"),
        ({"main": "s3://bucket/{000..002}.tar"}, "download the shards first"),
    ],
)
def test_mistakes(tars: Path, monkeypatch: pytest.MonkeyPatch, sources: dict[str, str], message: str) -> None:
    monkeypatch.chdir(tars)
    with pytest.raises(UserError, match=message):
        list_shards(sources)


def test_language_of_an_unknown_source(tars: Path) -> None:
    with pytest.raises(UserError, match="no such source"):
        list_shards({"main": str(tars / "a")}, {"mian": "zh"})
