"""Sources: which shards, how many samples, how two lists differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.order.manifest import (
    Manifest,
    SourceSpec,
    build_manifest,
    make_source,
)
from m2_encoder.data.order.manifest_record import describe_difference, describe_rewritten, read_record
from m2_encoder.data.shards.index import IndexHeader
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.errors import UserError
from tests.support.shards import make_sample, write_tar


def manifest(**sources: dict[str, Any]) -> Manifest:
    built = []
    for name, values in sources.items():
        shards = values.pop("sizes")
        spec = SourceSpec(name, **{"shards": "unused", **values})
        counts, sizes = zip(*shards.values(), strict=True)
        built.append(make_source(spec, list(shards), counts, sizes))
    return Manifest(built)


def difference(before: Manifest, now: Manifest) -> list[str]:
    return describe_difference(read_record(before.record()), read_record(now.record()))


def test_names_that_are_no_utf8_have_a_digest_of_their_own() -> None:
    digests = {manifest(a={"sizes": {name: (1, 1)}}).sources[0].digest() for name in ("/d/\udcff.tar", "/d/\udcfe.tar")}
    assert len(digests) == 2


def test_missing_shards_are_listed() -> None:
    def measure(shard: str) -> IndexHeader:
        if shard == "d/1.tar":
            raise FileNotFoundError(2, "No such file or directory")
        return IndexHeader(3, 9)

    with pytest.raises(UserError, match=r"data.sources.main: 1 of 3 shards cannot be read: d/1.tar \(No such file"):
        build_manifest([SourceSpec("main", "d/{0..2}.tar")], measure=measure)
    built = build_manifest([SourceSpec("main", "d/{2..3}.tar")], measure=measure)
    assert built.sources[0].samples == 6


def test_caps_take_the_first_samples_and_drop_what_is_not_used() -> None:
    own = manifest(a={"sizes": {"0": (5, 1), "1": (0, 1), "2": (5, 1), "3": (5, 1)}, "max_samples": 7}).sources[0]
    assert own.shards == ("0", "2")
    assert own.counts.tolist() == [5, 2]
    assert own.samples == 7


def test_weights_default_to_sizes() -> None:
    sizes = {"sizes": {"0": (30, 1)}}, {"sizes": {"1": (10, 1)}}
    assert manifest(a=dict(sizes[0]), b=dict(sizes[1])).weights == [30.0, 10.0]
    assert manifest(a={**sizes[0], "weight": 0.5}, b={**sizes[1], "weight": 2}).weights == [0.5, 2]
    with pytest.raises(UserError, match="b has no weight, others have one"):
        manifest(a={**sizes[0], "weight": 0.5}, b=dict(sizes[1]))


def test_the_difference_is_spelled_out() -> None:
    shards = {f"/d/{i}.tar": (10, 100 + i) for i in range(4)}
    old = manifest(a={"sizes": shards, "weight": 1}, gone={"sizes": {"g": (5, 5)}, "weight": 1})
    changed = {**{k: v for k, v in shards.items() if k != "/d/0.tar"}, "/d/9.tar": (7, 7), "/d/1.tar": (9, 99)}
    new = manifest(a={"sizes": changed, "weight": 2}, more={"sizes": {"m": (5, 5)}, "weight": 1})
    text = "\n".join(difference(old, new))
    for words in (
        "source gone removed",
        "source more added (1 shards)",
        "source a: weight 1 then, 2 now",
        "source a: 1 shard(s) added (/d/9.tar)",
        "source a: 1 shard(s) removed (/d/0.tar)",
        "source a: 1 shard(s) changed (/d/1.tar; /d/1.tar: 10 samples in 101 bytes then, 9 in 99 now)",
    ):
        assert words in text
    assert difference(old, old) == []


def test_moved_folders_are_no_difference_but_another_order_is() -> None:
    old = manifest(a={"sizes": {"/d/0.tar": (1, 2), "/d/1.tar": (3, 4)}})
    moved = manifest(a={"sizes": {"/elsewhere/0.tar": (1, 2), "/elsewhere/1.tar": (3, 4)}})
    turned = manifest(a={"sizes": {"/d/1.tar": (3, 4), "/d/0.tar": (1, 2)}})
    assert difference(old, moved) == []
    assert old.fingerprint() == moved.fingerprint()
    assert difference(old, turned) == ["source a: the same shards in another order"]
    assert old.fingerprint() != turned.fingerprint()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shards": "x", "languages": ["fr"]}, "must be some of en, zh"),
        ({"shards": "x", "weight": -1}, "weight=-1: must be a number, 0 or more"),
        ({"shards": "x", "max_samples": 0}, "max_samples=0: must be a whole number"),
        ({"shards": "x", "max_epochs": 1.5}, "max_epochs=1.5: must be a whole number"),
    ],
)
def test_impossible_sources_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SourceSpec("a", **values)


def test_sources_without_samples_or_shares_are_named() -> None:
    with pytest.raises(UserError, match=r"data.sources.a: no usable samples in unused"):
        manifest(a={"sizes": {"0": (0, 1)}})
    with pytest.raises(UserError, match="all weights are 0"):
        manifest(a={"sizes": {"0": (1, 1)}, "weight": 0})


def test_a_shard_of_the_same_size_with_other_samples_is_another_one(tmp_path: Path) -> None:
    def measured(*keys: str) -> Manifest:
        members = [member for key in keys for member in make_sample(key, 1)]
        write_tar(tmp_path / "a.tar", members)
        return build_manifest([SourceSpec("main", str(tmp_path))], measure=ShardReader().measure)

    before, same, other = measured("one", "two"), measured("one", "two"), measured("two", "one")
    assert before.sources[0].sizes == other.sources[0].sizes
    assert before.fingerprint() == same.fingerprint()
    assert before.fingerprint() != other.fingerprint()
    (line,) = difference(before, other)
    assert line.startswith(f"source main: 1 shard(s) changed ({tmp_path}/a.tar; ")
    assert line.endswith("of the same size, but its samples have other names, sizes or places)")


def test_a_shard_that_was_written_anew_at_the_same_size_is_told(tmp_path: Path) -> None:
    def measured(written: int) -> Any:
        write_tar(tmp_path / "a.tar", make_sample("one", 1))
        os.utime(tmp_path / "a.tar", ns=(written, written))
        found = build_manifest([SourceSpec("main", str(tmp_path))], measure=ShardReader().measure)
        return read_record(found.record())

    said: list[str] = []
    before, again, anew = measured(10), measured(10), measured(20)
    describe_rewritten(before, again, say=said.append)
    assert not said
    describe_rewritten(before, anew, say=said.append)
    (line,) = said
    assert line.startswith(f"1 shard(s) of the same size were written anew since it was saved ({tmp_path}/a.tar)")
    before["main"]["shards"][0][4] = 0  # of an earlier version, which did not know
    describe_rewritten(before, anew, say=said.append)
    assert said == [line]
