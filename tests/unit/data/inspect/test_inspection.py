"""Every fault of a shard and of its samples, injected: counted exactly, never raised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.inspect.inspection import (
    InspectionOptions,
    ShardInspection,
    ShardTask,
    find_captions,
    hash_bytes,
    inspect_shard,
)
from m2_encoder.data.loading.faults import SKIP_REASONS
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.data.shards.index import ShardIndex, open_index
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

ALL = InspectionOptions(samples_per_shard=None)
SOUND = [*make_sample("000", 0), *make_sample("001", 1)]


def _inspect(path: Path, options: InspectionOptions = ALL) -> ShardInspection:
    return inspect_shard(ShardTask(str(path), options))


def _replace(members: list[tuple[str, bytes]], name: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(key, content if key == name else value) for key, value in members]


def test_sound_shard(tmp_path: Path) -> None:
    found = _inspect(write_numbers(tmp_path, [5])[0])
    assert (found.indexed, found.inspected, len(found.rows), len(found.captions)) == (5, 5, 5, 10)
    assert not found.header_faults + found.content_faults + found.shard_faults
    assert found.extensions == {".png": 5, ".json": 5}
    assert found.json_keys == {"captions": 5}
    assert found.formats == {"png": 5}
    assert found.rows["width"].tolist() == [16] * 5
    assert found.rows["image"].tolist() == [hash_bytes(make_image(i)) for i in range(5)]
    spoken = [LANGUAGES[number] for number in found.captions["language"]]
    assert spoken == ["en", "zh"] * 5
    assert found.captions["characters"].tolist() == [8, 4] * 5
    assert found.captions["row"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert set(found.captions["words"]) == set(found.captions["tokens"]) == {-1}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (_replace(SOUND, "001.png", b""), "empty_member"),
        (SOUND[:2] + SOUND[3:], "missing_image"),
        (SOUND[:3], "missing_caption"),
        (_replace(SOUND, "001.json", b'{"url": "x"}'), "missing_caption"),
        (_replace(SOUND, "001.json", b"{"), "bad_json"),
        (_replace(SOUND, "001.json", b'{"caption": "\xff"}'), "not_utf8"),
        (_replace(SOUND, "001.json", b'{"caption": 7}'), "wrong_type"),
        (_replace(SOUND, "001.png", make_image(1)[:-90]), "undecodable_image"),
        (_replace(SOUND, "001.png", b"<html>"), "undecodable_image"),
        (_replace(SOUND, "001.png", make_image(1, side=100)), "too_many_pixels"),
        (_replace(SOUND, "001.png", make_image(1, side=2)), "too_small"),
        ([*SOUND, *make_sample("000", 7)], "duplicate_key"),
    ],
)
def test_faults_of_samples(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    found = _inspect(write_tar(tmp_path / "a.tar", members), ALL._replace(limits=ImageLimits(max_pixels=9000)))
    assert found.header_faults + found.content_faults == {reason: 1}
    assert len(found.rows) == (2 if reason == "duplicate_key" else 1)
    assert [fault.reason for fault in found.examples] == [reason]
    assert found.examples[0].key == ("000" if reason == "duplicate_key" else "001")
    assert reason in SKIP_REASONS
    assert not found.shard_faults


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 5)


def _garble(path: Path) -> None:
    path.write_bytes(b"not a tar at all" * 400)


@pytest.mark.parametrize(
    ("damage", "reason"), [(_cut, "truncated_shard"), (_garble, "not_a_tar"), (os.remove, "shard_missing")]
)
def test_faults_of_shards(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    path = write_numbers(tmp_path, [8])[0]
    damage(path)
    found = _inspect(path)
    assert found.shard_faults == {reason: 1}
    assert 0 < len(found.rows) < 8 if reason == "truncated_shard" else len(found.rows) == 0
    assert reason in {fault.reason for fault in found.examples}


def test_folder_in_the_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    assert _inspect(tmp_path / "a.tar").shard_faults == {"shard_missing": 1}


def test_shard_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbers(tmp_path, [3])[0]
    _inspect(path)
    counts = iter((4, 5))

    def replace_then_open(name: str, *, write: bool) -> ShardIndex:
        write_numbers(tmp_path, [next(counts)])
        return open_index(name, write=write)

    monkeypatch.setattr("m2_encoder.data.shards.reader.open_index", replace_then_open)
    assert _inspect(path).shard_faults == {"shard_changed": 1}
    with pytest.raises(SampleProblem, match="shard_changed"):
        find_captions(str(path), [1], ALL)


def test_samples_are_spread_evenly(tmp_path: Path) -> None:
    path = write_numbers(tmp_path, [100])[0]
    found = _inspect(path, InspectionOptions(samples_per_shard=4))
    assert (found.indexed, found.inspected) == (100, 4)
    expected = [hash_bytes(make_image(i)) for i in (12, 37, 62, 87)]
    assert found.rows["image"].tolist() == expected


def test_headers_alone_overlook_cut_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _replace(SOUND, "001.png", make_image(1)[:-90]))
    assert not _inspect(path, ALL._replace(decode=False)).content_faults


def test_words_and_tokens(tmp_path: Path) -> None:
    text = {"captions": {"en": ["a red balloon"], "zh": ["我来到北京清华大学"]}}
    path = write_tar(tmp_path / "a.tar", make_sample("0", 0, metadata=text))
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    found = _inspect(path, ALL._replace(words=True, tokenizer=tokenizer)).captions
    assert found["words"].tolist() == [3, 4]
    assert found["tokens"].tolist() == [len(tokenizer.encode(texts[0])) for texts in text["captions"].values()]


def test_identity_is_that_of_the_json_or_the_samples_own(tmp_path: Path) -> None:
    said = [{}, {"key": "k"}, {"key": "k", "identity": "0"}, {"key": "k"}, {"key": "4"}, {"identity": "0"}]
    metadata = [{"caption": "a", **each} for each in said]
    members = [member for i, value in enumerate(metadata) for member in make_sample(str(i), i, metadata=value)]
    found = _inspect(write_tar(tmp_path / "a.tar", members)).rows["identity"].tolist()
    again = _inspect(write_tar(tmp_path / "b.tar", members)).rows["identity"].tolist()
    assert found[1] == found[3] == again[1]
    assert found[2] == found[5] == again[2] == hash_bytes(b"0")
    assert len({*found, *again}) == 6, "those without a word of their own are alone in every shard"


def test_captions_are_found_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*SOUND, *_replace(make_sample("2", 2), "2.json", b"{")])
    wanted = [hash_bytes("数字 1".encode()), hash_bytes(b"number 0"), 12345]
    assert set(find_captions(str(path), wanted, ALL).values()) == {"数字 1", "number 0"}


def test_results_hold_plain_numbers(tmp_path: Path) -> None:
    """They travel between processes; a sample takes tens of bytes, not the kilobytes of its objects."""
    found = _inspect(write_numbers(tmp_path, [50])[0])
    assert found.rows.nbytes / 50 < 64
    assert found.captions.dtype.names is not None
    assert np.array_equal(found.captions["row"], np.repeat(np.arange(50), 2))
    assert json.dumps(dict(found.extensions))
