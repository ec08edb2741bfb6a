"""Samples by position: what stands in for unusable ones, what is listed, when a run ends; the same on every layout."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
from m2_encoder.data.images.transforms import TrainTransform, open_image
from m2_encoder.data.loading.faults import SKIP_REASONS, FaultLog, SampleFault
from m2_encoder.data.loading.pixel_rows import join_rows
from m2_encoder.data.loading.stream import SampleStream, content_identity, list_index_faults
from m2_encoder.data.order.manifest import SourceSpec, build_manifest
from m2_encoder.data.order.plan import PositionPlan
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.samples.sample import Sample
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.errors import UserError
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

CAPTIONS = CaptionSampler(language_weights={"en": 1, "zh": 1}, role_weights={"original": 1, "keyword": 1})
SIDE = 8


def make_stream(*shards: Path, seed: int = 1, lanes: int = 1, **values: Any) -> SampleStream:
    reader = ShardReader()
    specs = [SourceSpec(name=f"s{i}", shards=str(shard)) for i, shard in enumerate(shards)]
    settings = {
        "captions": CAPTIONS,
        "decode": decode_image_uint8,
        "transform": TensorTrainTransform(SIDE, scale=(0.6, 1.0)),
    }
    plan = PositionPlan(build_manifest(specs, measure=reader.measure), seed=seed, lanes=lanes, window=40)
    return SampleStream(plan, reader=reader, **{**settings, **values})


def with_bad(good: int, bad: dict[str, list[tuple[str, bytes]]]) -> list[tuple[str, bytes]]:
    members = [member for i in range(good) for member in make_sample(f"{i:06d}", i)]
    return members + [(f"{key}.{extension}", content) for key, files in bad.items() for extension, content in files]


CAPTION = json.dumps({"caption": "a cat"}).encode()
BAD: dict[str, tuple[str, list[tuple[str, bytes]]]] = {
    "cut": ("undecodable_image", [("png", make_image(1, side=64)[:200]), ("json", CAPTION)]),
    "text": ("undecodable_image", [("jpg", b"no picture at all"), ("json", CAPTION)]),
    "tiny": ("too_small", [("png", make_image(1, side=1)), ("json", CAPTION)]),
    "mute": ("missing_caption", [("png", make_image(1)), ("json", b'{"url": "x"}')]),
    "blank": ("missing_caption", [("png", make_image(1)), ("txt", b"  \n")]),
    "broken": ("bad_json", [("png", make_image(1)), ("json", b'{"caption": ')]),
    "latin": ("not_utf8", [("png", make_image(1)), ("txt", "caf\u00e9".encode("latin-1"))]),
    "number": ("wrong_type", [("png", make_image(1)), ("json", b'{"caption": 5}')]),
    "french": ("missing_caption", [("png", make_image(1)), ("json", b'{"captions": {"fr": ["chat"]}}')]),
    "role": (
        "wrong_type",
        [("png", make_image(1)), ("json", b'{"captions": {"en": [{"text": "x", "role": "poem"}]}}')],
    ),
}


@pytest.mark.parametrize("key", list(BAD))
def test_an_unusable_sample_is_replaced_counted_and_named(tmp_path: Path, key: str) -> None:
    reason, files = BAD[key]
    assert reason in SKIP_REASONS
    shard = write_tar(tmp_path / "0.tar", with_bad(9, {key: files}))
    stream = make_stream(shard)
    faults = [fault for position in range(30) for fault in stream[position].faults]  # three epochs
    assert {(f.source, f.shard, f.key, f.reason) for f in faults} == {("s0", str(shard), key, reason)}
    assert len(faults) >= 3
    assert "\n" not in faults[0].describe()
    keys = Counter(stream[position].sample.key for position in range(30))
    assert set(keys) == {f"{i:06d}" for i in range(9)}
    assert min(keys.values()) >= 3


def test_what_headers_tell_is_listed_at_the_start_and_never_drawn(tmp_path: Path) -> None:
    bad = {"alone": [("png", make_image(1))], "silent": [("json", CAPTION)], "empty": [("png", b""), ("json", CAPTION)]}
    write_tar(tmp_path / "0.tar", with_bad(5, bad))
    cut = tmp_path / "1.tar"
    cut.write_bytes(write_tar(cut, with_bad(5, {})).read_bytes()[:-12_000])
    stream = make_stream(tmp_path)
    listed = Counter((f.key, f.reason) for f in list_index_faults(stream._plan, stream._reader))
    assert listed[None, "truncated_shard"] == 1
    for item in (("alone", "missing_caption"), ("silent", "missing_image"), ("empty", "empty_member")):
        assert listed[item] == 1
    assert not any(stream[position].faults for position in range(40))


def same(mine: Sample, theirs: Sample) -> bool:
    return torch.equal(mine.image, theirs.image) and mine._replace(image=None) == theirs._replace(image=None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    seed=st.integers(0, 2**40),
    lanes=st.sampled_from([1, 2, 4]),
    corrupt=st.sets(st.integers(0, 39), max_size=25),
    order=st.randoms(use_true_random=False),
)
def test_a_position_gives_the_same_whatever_was_read_before(
    tmp_path: Path, seed: int, lanes: int, corrupt: set[int], order: Any
) -> None:
    # Two sources, a share of them corrupt; read in order, and in any other order by streams of their own.
    for number, count in enumerate((25, 15)):
        members = []
        for i in range(count):
            sample = make_sample(f"{i:06d}", i)
            members += [(sample[0][0], b"damaged"), sample[1]] if i + 25 * number in corrupt - {0, 25} else sample
        write_tar(tmp_path / f"{number}.tar", members)
    stream = make_stream(tmp_path / "0.tar", tmp_path / "1.tar", seed=seed, lanes=lanes)
    expected = {position: stream[position] for position in range(60)}
    positions = list(range(60))
    order.shuffle(positions)
    workers = [make_stream(tmp_path / "0.tar", tmp_path / "1.tar", seed=seed, lanes=lanes) for _ in range(3)]
    for position in positions:
        delivery = workers[order.randrange(3)][position]
        assert same(delivery.sample, expected[position].sample)
        assert delivery.faults == expected[position].faults
    # In batches of any size, which also lie in one memory.
    start = 0
    while start < 60:
        size = order.randrange(1, 45)
        batch = list(workers[0].deliver(range(start, min(60, start + size))))
        for position, delivery in enumerate(batch, start):
            assert same(delivery.sample, expected[position].sample)
            assert delivery.faults == expected[position].faults
        assert join_rows([delivery.sample.image for delivery in batch]) is not None
        start += size
    for delivery in expected.values():
        assert delivery.sample.key not in {fault.key for fault in delivery.faults}


def test_a_sample_is_the_same_whether_it_was_decoded_before_or_not(tmp_path: Path) -> None:
    # A resumed run decodes anew what an uninterrupted one has kept; three epochs of six samples.
    write_numbers(tmp_path, [4, 2])
    transform = TrainTransform(SIDE, num_ops=3, color_jitter=(0.3, 0.3, 0.3, 0.1), rotate_degrees=20)
    kept, fresh = (
        make_stream(tmp_path, decode=open_image, transform=transform, keep_decoded=keep) for keep in (True, False)
    )
    assert all(same(kept[position].sample, fresh[position].sample) for position in range(18))


def test_a_shard_that_is_gone_is_one_fault_and_the_rest_goes_on(tmp_path: Path) -> None:
    shards = write_numbers(tmp_path, [10, 10, 10])
    stream = make_stream(tmp_path)
    shards[1].unlink()
    deliveries = [stream[position] for position in range(30)]
    assert {int(d.sample.key) // 10 for d in deliveries} == {0, 2}
    faults = [fault for delivery in deliveries for fault in delivery.faults]
    assert {(f.shard, f.key, f.reason) for f in faults} == {(str(shards[1]), None, "shard_missing")}
    assert len(faults) >= 10
    log = FaultLog(tmp_path / "bad.jsonl", max_share=0.9)
    log.add(faults, drawn=30)
    assert log.counts == {"shard_missing": len(faults)}
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(5, 5))


@pytest.mark.parametrize(
    "change", [rewrite, lambda path: os.truncate(path, 1000), lambda path: write_numbers(path.parent, [9], first=50)]
)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_shard_that_changes_is_never_read_wrongly(
    tmp_path: Path, change: Callable[[Path], object], is_open: bool
) -> None:
    (shard,) = write_numbers(tmp_path, [10])
    write_numbers(tmp_path / "more", [10], first=100)
    stream = make_stream(tmp_path, tmp_path / "more", lanes=1)
    for position in range(20 if is_open else 0):
        stream[position]
    change(shard)
    given: list[int] = []
    with pytest.raises(UserError, match=r"0.tar: shard_changed .*32 samples in a row are unusable"):
        given += [int(stream[position].sample.key) for position in range(20, 60)]
    assert all(key >= 100 for key in given)


def test_all_unusable_ends_the_run_with_places(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [m for i in range(5) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"text"))])
    with pytest.raises(UserError, match=r"0.tar:\d: undecodable_image .*32 samples in a row are unusable; mend"):
        make_stream(tmp_path)[0]


def test_captions_languages_and_identity_travel(tmp_path: Path) -> None:
    members = []
    for key, content in (
        ("a", {"captions": {"en": ["one"], "zh": ["一"]}, "key": "concept"}),
        ("b", {"caption": "一只猫", "key": "concept"}),
        ("c", {"text": "a dog"}),
    ):
        members += [(f"{key}.png", make_image(3)), (f"{key}.json", json.dumps(content).encode())]
    members += [("d.png", make_image(3)), ("d.txt", "纯文本".encode())]
    stream = make_stream(write_tar(tmp_path / "0.tar", members))
    seen: dict[str, set[tuple[str, str]]] = {}
    identity = {}
    for position in range(60):
        sample = stream[position].sample
        seen.setdefault(sample.key, set()).add(tuple(sample.captions[0]))
        identity[sample.key] = sample.identity
        assert sample.source == "s0"
        assert sample.image.shape == (3, SIDE, SIDE)
        assert sample.image.dtype == torch.uint8
    assert seen == {
        "a": {("one", "en"), ("一", "zh")},
        "b": {("一只猫", "zh")},
        "c": {("a dog", "en")},
        "d": {("纯文本", "zh")},
    }
    assert identity["a"] == identity["b"]
    assert len(set(identity.values())) == 3


def test_names_of_files_that_come_again_in_other_shards_and_sources_mark_nothing(tmp_path: Path) -> None:
    """Most tools count samples up from 0 in every shard, and img2dataset repeats that number as the `key`."""
    said: dict[str, dict[str, Any]] = {
        "0": {"caption": "x"},
        "1": {"caption": "x", "key": "1"},
        "cats/2": {"caption": "x", "key": "2"},
        "3": {"caption": "x", "key": "photo"},
        "4": {"caption": "x", "identity": "same"},
    }
    for shard in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_tar(tmp_path / shard, [m for i, (k, v) in enumerate(said.items()) for m in make_sample(k, i, metadata=v)])
    stream = make_stream(tmp_path / "a", tmp_path / "b")
    identities: dict[str, set[int]] = {key: set() for key in said}
    for position in range(60):
        sample = stream[position].sample
        identities[sample.key].add(sample.identity)
    assert {key: len(found) for key, found in identities.items()} == {"0": 3, "1": 3, "cats/2": 3, "3": 2, "4": 1}
    assert identities["4"] == {content_identity("same")}
    assert len(set().union(*identities.values())) == 12, "nothing else is equal"


def fault(key: str | None, shard: str = "0.tar", reason: str = "bad_json") -> SampleFault:
    return SampleFault("s", shard, key, reason, "odd")


def test_the_list_names_each_sample_once_over_processes_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    mine, theirs = FaultLog(path), FaultLog(path)
    mine.add([fault("a"), fault("b"), fault("a")], drawn=1000)
    theirs.add([fault("b"), fault("c"), fault(None)], drawn=1000)
    mine.add([fault("c"), fault("a", shard="1.tar")], drawn=1000)
    with path.open("a") as file:
        file.write('{"shard": "0.tar", "k')  # a process was killed while it wrote
    FaultLog(path).add([fault("b"), fault("last")], drawn=10)
    lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in [*lines[:5], *lines[6:]]]
    assert [(e["shard"], e["key"]) for e in entries] == [
        ("0.tar", "a"), ("0.tar", "b"), ("0.tar", "c"), ("0.tar", None), ("1.tar", "a"),
        ("0.tar", "last"),
    ]  # fmt: skip
    assert mine.counts == {"bad_json": 5}


def test_the_budget_is_a_share_or_a_number(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "bad.jsonl", max_share=0.01)
    log.add([fault(str(i)) for i in range(10)], drawn=0)
    log.add([], drawn=990)
    log.add([fault("x")], drawn=99)
    with pytest.raises(
        UserError, match=r"12 of 1101 samples are unusable, more than data.max_bad_share=0.01: bad_json"
    ):
        log.add([fault("y")], drawn=0)
    few = FaultLog(None, max_samples=2)
    few.add([fault("a"), fault("b"), fault("a")], drawn=0)  # drawn twice, listed once
    with pytest.raises(UserError, match=r"0.tar:a: bad_json .*3 unusable .*than data.max_bad_samples=2: bad_json 4"):
        few.add([fault("c")], drawn=0)


def test_only_indices_with_faults_are_read_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path, [4, 4, 4])
    (tmp_path / "garbage.tar").write_bytes(b"no tar at all" * 99)
    write_tar(tmp_path / "mute.tar", [*make_sample("a", 1), ("b.png", make_image(2))])
    stream = make_stream(tmp_path)
    opened: list[str] = []
    real = ShardReader.faults
    monkeypatch.setattr(ShardReader, "faults", lambda self, shard: opened.append(shard) or real(self, shard))
    found = {(Path(f.shard).name, f.key, f.reason) for f in list_index_faults(stream._plan, stream._reader)}
    assert found == {("garbage.tar", None, "not_a_tar"), ("mute.tar", "b", "missing_caption")}
    assert [Path(shard).name for shard in opened] == ["garbage.tar", "mute.tar"]
    capped = [SourceSpec("s", [str(tmp_path / "000000.tar"), str(tmp_path / "garbage.tar")], max_samples=3)]
    assert build_manifest(capped, measure=ShardReader().measure).sources[0].faulty == (), "beyond what is used"
