from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import SourceReport, check_source
from m2_encoder.data.inspect.statistics import Histogram, measure_statistics
from m2_encoder.data.inspect.survey import survey_source
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

ALL = InspectionOptions(samples_per_shard=None)


def _check(shards: list[Path], **values: Any) -> SourceReport:
    survey = survey_source(shards, values.pop("options", ALL), **({"max_shards": None} | values))
    return check_source(survey, batch_size=16)


def _write(folder: Path, captions: list[str], *, same_image: bool = False) -> list[Path]:
    members = [
        member
        for i, text in enumerate(captions)
        for member in ((f"{i:03d}.png", make_image(0 if same_image else i)), (f"{i:03d}.txt", text.encode()))
    ]
    return [write_tar(folder / "a.tar", members)]


def test_whole_source(tmp_path: Path) -> None:
    report = _check(write_numbers(tmp_path, [20, 15]), workers=2)
    assert (report.samples, report.inspected, report.usable, report.usable_share) == (35, 35, 35, 1.0)
    assert (report.is_whole, report.problems, report.warnings) == (True, (), ())
    assert {name: value[:2] for name, value in report.languages.items()} == {"en": (35, 35), "zh": (35, 35)}
    assert report.languages["en"].characters == (8, 8, 9, 9, 9)
    assert report.width == (16,) * 5
    assert (report.captions, report.images) == ((70, 70, 1), (35, 35, 1))
    assert json.loads(json.dumps(report.to_dict()))["languages"]["zh"]["captions"] == 35


def test_workers_change_nothing(tmp_path: Path) -> None:
    shards = write_numbers(tmp_path, [4, 6, 5])
    assert _check(shards, workers=0) == _check(shards, workers=2)


def test_part_of_a_source_estimates_the_whole(tmp_path: Path) -> None:
    shards = write_numbers(tmp_path, [40] * 10)
    report = _check(shards, max_shards=2, options=InspectionOptions(samples_per_shard=10))
    assert (report.inspected_shards, report.inspected, report.is_whole) == (2, 20, False)
    assert 390 <= report.samples <= 410


def test_usable_share_counts_all_that_is_there(tmp_path: Path) -> None:
    """Of ten samples one lacks its image, which headers tell, and two of the others are damaged."""
    members = [member for i in range(10) for member in make_sample(f"{i}", i)]
    broken = [(name, b"x" if name in ("3.png", "4.json") else content) for name, content in members if name != "0.png"]
    report = _check([write_tar(tmp_path / "a.tar", broken)])
    assert report.faults == {"bad_json": 1, "missing_image": 1, "undecodable_image": 1}
    assert (report.samples, report.usable_share) == (7, pytest.approx(0.7))
    assert any("30.0% of the samples cannot be used" in line for line in report.warnings)


def test_frequent_captions_across_shards(tmp_path: Path) -> None:
    for shard in range(3):
        texts = ["same everywhere", f"only {shard}", "猫" if shard else "other"]
        members = [
            m for i, text in enumerate(texts) for m in make_sample(f"{i}", 10 * shard + i, metadata={"text": text})
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    report = _check(sorted(tmp_path.glob("*.tar")))
    assert report.frequent_captions == (("same everywhere", 3), ("猫", 2))
    assert report.captions == (9, 6, 3)
    assert (report.batch_size, report.false_negatives.batch_size) == (16, 9), "no batch is larger than the source"


def _empty(folder: Path) -> list[Path]:
    return [write_tar(folder / "a.tar", [])]


def _other_members(folder: Path) -> list[Path]:
    return [write_tar(folder / "a.tar", [("0.jpg", make_image(0)), ("0.cls", b"7"), ("1.jpg", b""), ("1.cls", b"8")])]


def _other_keys(folder: Path) -> list[Path]:
    return [write_tar(folder / "a.tar", make_sample("0", 0, metadata={"alt": "a cat"}))]


@pytest.mark.parametrize(
    ("write", "messages"),
    [
        (lambda _: [], ["it has no shards"]),
        (_empty, ["no usable sample"]),
        (lambda folder: [folder / "gone.tar"], ["no usable sample", "1 shard_missing"]),
        (_other_members, ["no usable sample", "2 missing_caption", "members seen: .cls, .jpg", "m2-data pack"]),
        (_other_keys, ["no usable sample", "its JSON has alt", "members seen: .json, .png"]),
        (lambda folder: write_numbers(folder, [1]), ["one usable sample"]),
        (lambda folder: _write(folder, ["a cat"] * 5), ["all captions are the same ('a cat')"]),
        (lambda folder: _write(folder, list("abcde"), same_image=True), ["all images are the same file"]),
    ],
)
def test_pointless_sources(tmp_path: Path, write: Any, messages: list[str]) -> None:
    report = _check(write(tmp_path))
    text = "; ".join(report.problems)
    assert all(message in text for message in messages), text


def test_sound_source_is_not_refused(tmp_path: Path) -> None:
    assert not _check(write_numbers(tmp_path, [3])).problems


def test_warnings(tmp_path: Path) -> None:
    shards = _write(tmp_path, ["cat", "cat", "cat", "dog"])
    (tmp_path / "b.tar").write_bytes(b"garbage" * 100)
    report = _check([*shards, tmp_path / "b.tar"])
    text = "\n".join(report.warnings)
    for part in (
        "1 shard(s) are no tars",
            "75.0% of the rows of a batch of 4 have a false negative (equal captions: m2-data curate ",
            "duplicates.captions=N", "identity in the .json",
        "4 usable samples are fewer than a batch of 16", "data.global_batch_size=4", "all captions are in en",
    ):  # fmt: skip
        assert part in text
    assert not report.problems


def test_statistics(tmp_path: Path) -> None:
    texts = [{"captions": {"en": ["a"] * 1}}, {"captions": {"en": ["a", "bb"], "zh": ["猫"]}}, {"text": "ccc"}]
    members = [m for i, text in enumerate(texts) for m in make_sample(f"{i}", i // 2, metadata=text)]
    found = measure_statistics(survey_source([write_tar(tmp_path / "a.tar", members)], ALL))
    assert found.caption_counts == {"en": 4, "zh": 1}
    assert found.sample_languages == {"en": 2, "en+zh": 1}
    assert found.captions_per_sample == {1: 2, 3: 1}
    assert found.lengths == {"characters": {"en": ((1, 2, 3), (2, 1, 1)), "zh": ((1,), (1,))}}
    assert found.repeated["captions"] == pytest.approx((0.6, 0.4, 0, 0, 0, 0))
    assert found.repeated["images"] == pytest.approx((1 / 3, 2 / 3, 0, 0, 0, 0))
    assert found.sizes.tolist() == [[16, 16]] * 3
    assert json.dumps(found.to_dict())
    assert Histogram((1, 5, 9), (2, 1, 1)).share_above(4) == 0.5


def test_limits_are_those_that_are_given(tmp_path: Path) -> None:
    report = _check(write_numbers(tmp_path, [3]), options=ALL._replace(limits=ImageLimits(min_side_px=17)))
    assert report.faults == {"too_small": 3}


def test_captions_in_other_languages_are_counted_and_named(tmp_path: Path) -> None:
    metadata: list[dict[str, Any]] = [
        {"captions": {"zh-CN": ["猫"], "fr": ["chat", "matou"]}},
        {"captions": {"en": ["cat"], "de": ["Katze"]}},
        {"captions": {"fr": ["chien"]}},
        {"captions": {"en": ["dog"]}},
    ]
    members = [member for i, value in enumerate(metadata) for member in make_sample(f"{i}", i, metadata=value)]
    report = _check([write_tar(tmp_path / "a.tar", members)])
    assert (report.left_out, report.faults) == ({"fr": 3, "de": 1}, {"missing_caption": 1})
    assert "left out: 3 captions in fr, 1 in de, which are neither Chinese nor English" in report.warnings
    assert {name: value.captions for name, value in report.languages.items()} == {"en": 2, "zh": 1}


def test_captions_are_counted_for_the_tokenizer_and_the_context_of_the_model(tmp_path: Path) -> None:
    shards = _write(tmp_path, ["a red cat on a red mat", "cat", "a \U0001f9ff", "猫"])
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=6)
    tokens = [tokenizer.encode(text) for text in ("a red cat on a red mat", "cat", "a \U0001f9ff")]
    report = _check(shards, options=ALL._replace(tokenizer=tokenizer))
    assert report.tokens is not None
    cut = sum(len(ids) > 4 for ids in tokens)
    assert report.tokens.languages["en"] == (3, cut, sum(map(len, tokens)), 4, 1)
    assert report.tokens.languages["zh"].captions == 1
    assert any(
        line.startswith(f"{cut} of 3 en captions") and "lose their beginning (truncation_side=left)" in line
        for line in report.warnings
    )
    assert any("of the tokens of en captions are bytes or unknown" in line for line in report.warnings)
    other = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=60, truncation_side="right")
    longer = _check(shards, options=ALL._replace(tokenizer=other)).tokens
    assert longer is not None
    assert (longer.languages["en"].cut, longer.lost) == (0, "end")
    assert json.loads(json.dumps(report.to_dict()))["tokens"]["context_length"] == 6
