"""The look at the sources before training: what ends a run, what is worth a warning, and that it costs little."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.inspect.source_report import SourceReport
from m2_encoder.data.inspect.start_check import describe_problems
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.shards.index import open_index
from m2_encoder.errors import UserError
from tests.support.mixtures import make_mixture
from tests.support.shard_server import serve_shards
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

CHECK = {"shards": 2, "samples": 400}

Members = Callable[[int], list[tuple[str, bytes]]]


def _write(path: Path, members: Members, count: int = 200) -> str:
    write_tar(path, [member for i in range(count) for member in members(i)])
    return str(path)


def _cut(number: int, *, every: int) -> list[tuple[str, bytes]]:
    image, text = make_sample(f"{number:04d}", number)
    return [(image[0], image[1][:200] if number % every == 0 else image[1]), text]


def _english(number: int) -> list[tuple[str, bytes]]:
    return make_sample(f"{number:04d}", number, metadata={"captions": {"en": [f"number {number}"]}})


def _check(tmp_path: Path, sources: Mapping[str, str | dict[str, Any]], **overrides: Any) -> dict[str, SourceReport]:
    specs = {name: {"shards": value} if isinstance(value, str) else value for name, value in sources.items()}
    values = {"check": CHECK, "max_bad_share": 0.05, **overrides}
    return make_mixture(tmp_path / "unused", sources=specs, **values).check_sources()


def test_nothing_speaks_against_a_sound_source(tmp_path: Path) -> None:
    write_numbers(tmp_path / "tars", [60, 60, 60, 60])
    reports = _check(tmp_path, {"main": f"{tmp_path}/tars"})
    assert not describe_problems(reports)
    assert not reports["main"].warnings
    assert (reports["main"].inspected_shards, reports["main"].inspected, reports["main"].samples) == (2, 120, 240)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        (lambda i: make_sample(f"{i}", i, metadata={"alt": "x"}), "no usable sample (200 missing_caption"),
        (
            lambda i: make_sample(f"{i}", i, metadata={"captions": {"en": [{"text": f"{i}", "role": "poem"}]}}),
            "no usable sample (200 wrong_type, such as 0.tar:0: unknown role poem",
        ),
        (lambda i: make_sample(f"{i}", i, metadata={"caption": "photo"}), "all captions are the same ('photo')"),
        (lambda i: [(f"{i}.png", make_image(0)), (f"{i}.txt", f"a {i}".encode())], "all images are the same file"),
        (
            lambda i: make_sample(f"{i}", i, metadata={"caption": f"a cat, {i}", "identity": "cat"}),
            "all samples have one identity, as pictures of one class do: nothing to tell apart",
        ),
        (lambda i: [(f"{i}.png", make_image(i, side=3)), (f"{i}.txt", b"a")], "no usable sample (200 too_small"),
        (lambda i: _cut(i, every=3), "of the samples that the run would draw cannot be used"),
    ],
)
def test_pointless_runs_are_refused_with_the_source(tmp_path: Path, members: Members, named: str) -> None:
    reports = _check(tmp_path, {"main": _write(tmp_path / "0.tar", members)})
    (problem,) = describe_problems(reports)
    assert problem.startswith("data.sources.main: ")
    assert named in problem


def test_keys_seen_are_named(tmp_path: Path) -> None:
    shard = _write(tmp_path / "0.tar", lambda i: make_sample(f"{i}", i, metadata={"alt": "x", "url": "y"}))
    (problem,) = describe_problems(_check(tmp_path, {"main": shard}))
    assert "members seen: .json, .png" in problem
    assert "its JSON has alt, url" in problem


def test_languages_without_a_weight(tmp_path: Path) -> None:
    shard = _write(tmp_path / "0.tar", _english)
    chinese = CaptionSampler(language_weights={"zh": 1}, role_weights={"original": 1})
    (problem,) = describe_problems(_check(tmp_path, {"main": shard}, captions=chinese))
    assert "no caption in zh" in problem
    assert "give en a weight" in problem


def test_some_captions_in_another_language_are_a_warning_and_count_as_unusable(tmp_path: Path) -> None:
    shard = _write(tmp_path / "0.tar", lambda i: _english(i) if i % 4 == 0 else make_sample(f"{i:04d}", i))
    chinese = CaptionSampler(language_weights={"zh": 1}, role_weights={"original": 1})
    reports = _check(tmp_path, {"main": shard}, captions=chinese, max_bad_share=0.5)
    assert not describe_problems(reports)
    assert any(text.startswith("25.0% of the samples have no caption in zh") for text in reports["main"].warnings)
    assert describe_problems(_check(tmp_path, {"main": shard}, captions=chinese, max_bad_share=0.1))


def test_limits_of_training_hold(tmp_path: Path) -> None:
    shard = _write(tmp_path / "0.tar", lambda i: make_sample(f"{i}", i))  # 16 x 16 pixels
    assert not describe_problems(_check(tmp_path, {"main": shard}))
    strict = partial(decode_image_uint8, min_side_px=17)
    assert "too_small" in describe_problems(_check(tmp_path, {"main": shard}, decode=strict))[0]


def test_shares_of_a_mixture_decide(tmp_path: Path) -> None:
    bad = _write(tmp_path / "bad" / "0.tar", lambda i: _cut(i, every=5), 1000)
    write_numbers(tmp_path / "good", [200])
    good = f"{tmp_path}/good"
    rare = {"bad": {"shards": bad, "weight": 1}, "good": {"shards": good, "weight": 20}}
    assert not describe_problems(_check(tmp_path, rare))
    often = {"bad": {"shards": bad, "weight": 1}, "good": {"shards": good, "weight": 1}}
    (problem,) = describe_problems(_check(tmp_path, often, check={"samples": 2000}))  # enough to be sure
    assert problem.startswith("data.sources.bad: about 10.0%")
    assert problem.endswith("or train without it: ~data.sources.bad")
    unused = {"bad": {"shards": bad, "weight": 0}, "good": {"shards": good, "weight": 1}}
    assert list(_check(tmp_path, unused)) == ["good"]


def test_false_negatives_are_those_of_the_rows_in_a_batch(tmp_path: Path) -> None:
    shard = _write(
        tmp_path / "0.tar", lambda i: make_sample(f"{i}", i, metadata={"captions": {"en": [f"c {i % 100}"]}})
    )
    report = _check(tmp_path, {"main": shard}, global_batch_size=128)["main"]
    # Each row has one partner among 199, of which 127 are in its batch.
    assert report.false_negatives.share_of_rows == pytest.approx(127 / 199)
    assert any("63.8% of the rows of a batch of 128" in warning for warning in report.warnings)


def test_validation_sets_are_looked_at(tmp_path: Path) -> None:
    write_numbers(tmp_path / "tars", [60])
    words = {"captions": {"en": [{"text": "cat", "role": "keyword"}]}}
    _write(tmp_path / "val" / "0.tar", lambda i: make_sample(f"{i}", i, metadata=words), 3)
    with pytest.raises(UserError, match=r"data\.validation\.own=.*which are no queries.*~data\.validation\.own"):
        _check(tmp_path, {"main": f"{tmp_path}/tars"}, validation={"own": str(tmp_path / "val")})


def test_validation_sets_that_share_pictures_with_training_are_named(tmp_path: Path) -> None:
    tars = write_numbers(tmp_path / "tars", [60])
    _write(tmp_path / "own" / "0.tar", lambda i: make_sample(f"{i}", 50 + i), 20)  # 50 to 59 are trained on
    _write(tmp_path / "new" / "0.tar", lambda i: make_sample(f"{i}", 100 + i), 20)
    sets = {"own": str(tmp_path / "own"), "new": str(tmp_path / "new"), "same": str(tars[0].parent)}
    warnings = _check(tmp_path, {"main": f"{tmp_path}/tars"}, validation=sets)["main"].warnings
    assert [text.partition(":")[0] for text in warnings] == [
        "10 of the 20 pictures of data.validation.own are also here",
        "60 of the 60 pictures of data.validation.same are also here",
    ]


def test_a_validation_set_smaller_than_k_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_numbers(tmp_path / "tars", [60])
    sets = {f"of{count}": str(write_numbers(tmp_path / f"of{count}", [count], first=100)[0]) for count in (10, 11)}
    _check(tmp_path, {"main": f"{tmp_path}/tars"}, validation=sets)
    assert caplog.messages == [
        "data.validation.of10: 10 samples: recall at 10 is always 100 %, and mean recall says little"
    ]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("un chat bien élevé, {}", "60 of 60 captions that count as English have letters such as é, ß or ñ"),
        ("🐱 🐶 {}", "60 of 60 captions that count as English have no letters"),
        ("a café, number {}", None),
    ],
)
def test_captions_that_may_not_be_english_are_a_warning(tmp_path: Path, caption: str, named: str | None) -> None:
    texts = [caption.format(i) if named or i % 20 == 0 else f"number {i}" for i in range(60)]
    shard = _write(tmp_path / "0.tar", lambda i: make_sample(f"{i}", i, metadata={"captions": {"en": [texts[i]]}}), 60)
    warnings = _check(tmp_path, {"main": {"shards": shard, "languages": ["en"]}})["main"].warnings
    assert [text.partition(":")[0] for text in warnings if "count as English" in text] == ([named] if named else [])


def test_prepare_data_refuses_and_looks_once(tmp_path: Path) -> None:
    shard = _write(tmp_path / "0.tar", lambda i: make_sample(f"{i}", i, metadata={"caption": "photo"}))
    module = make_mixture(tmp_path / "unused", sources={"main": {"shards": shard}}, check=CHECK)
    with pytest.raises(UserError, match="all captions are the same"):
        module.prepare_data()
    waived = make_mixture(tmp_path / "unused", sources={"main": {"shards": shard}}, check=CHECK)
    waived.skip_check()
    waived.prepare_data()
    assert waived.manifest.sources[0].samples == 200


def test_a_part_of_a_large_shard_is_read(tmp_path: Path) -> None:
    write_numbers(tmp_path / "tars", [4000])
    module = make_mixture(tmp_path / "unused", sources={"main": {"shards": f"{tmp_path}/tars"}}, check={"samples": 100})
    assert module.manifest.sources[0].samples == 4000  # indexed
    start = time.process_time()
    report = module.check_sources()["main"]
    assert time.process_time() - start < 1, "a start waits for this"
    assert report.inspected == 100
    assert report.samples == 4000


def test_one_shard_of_a_remote_source_is_fetched(tmp_path: Path) -> None:
    for path in write_numbers(tmp_path / "far", [40, 40, 40]):
        open_index(path)
    with serve_shards(tmp_path / "far") as server:
        cache = {"folder": str(tmp_path / "copies"), "max_bytes": 1 << 30}
        report = _check(tmp_path, {"main": server.url("{000000..000002}.tar")}, cache=cache)["main"]
        fetched = [name for name in server.requests if name.endswith(".tar")]
    assert not report.problems
    assert fetched == ["000001.tar"]
    assert (report.inspected, report.samples, report.shards) == (40, 120, 3)


@pytest.mark.parametrize("values", [{"shards": 0}, {"samples": True}])
def test_settings_are_checked(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be a whole number, 1 or more"):
        make_mixture(tmp_path, check=values)
