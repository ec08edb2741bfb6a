"""m2-data check and stats on every way to name a source, on remote shards, and on every kind of fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_commands import Start
from tests.support.shard_server import serve_shards
from tests.support.shards import make_image, make_sample, write_numbers, write_tar


@pytest.fixture
def look(start: Start, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and JSON of a check in this process."""

    def run(source: str, *more: str) -> tuple[int, dict[str, Any]]:
        code = start("check", f"source={source}", "json=true", "workers=0", *more)
        return code, json.loads(capsys.readouterr().out)

    return run


Look = Callable[..., tuple[int, dict[str, Any]]]


@pytest.mark.parametrize(
    ("source", "shards"),
    [
        ("a", 3),
        ("a/000001.tar", 1),
        ("a/{000000..000001}.tar", 2),
        ("a/00000[02].tar", 2),
        ("[a,b]", 5),
        ("[a/000000.tar,'b/*.tar']", 3),
    ],
)
def test_ways_to_name_a_source(look: Look, tmp_path: Path, source: str, shards: int) -> None:
    write_numbers(tmp_path / "a", [4, 4, 4])
    write_numbers(tmp_path / "b", [4, 4], first=100)
    code, report = look(source)
    assert code == 0
    assert (report["shards"], report["samples"], report["is_whole"]) == (shards, 4 * shards, True)


def _png(key: str, number: int, content: bytes, text: bytes = b'{"caption": "a cat"}') -> list[tuple[str, bytes]]:
    return [(f"{key}.png", content), (f"{key}.json", text)]


# By reason, samples that have it; images carry their number, so that none repeats.
FAULTS: dict[str, Callable[[str, int], list[tuple[str, bytes]]]] = {
    "empty_member": lambda key, n: _png(key, n, b""),
    "missing_image": lambda key, n: [(f"{key}.json", b'{"caption": "a"}')],
    "missing_caption": lambda key, n: [(f"{key}.png", make_image(n)), (f"{key}.json", b'{"alt": "a"}')],
    "bad_json": lambda key, n: _png(key, n, make_image(n), b"{"),
    "not_utf8": lambda key, n: _png(key, n, make_image(n), '{"caption": "照片"}'.encode("gbk")),
    "undecodable_image": lambda key, n: _png(key, n, make_image(n)[:-80]),
    "too_many_pixels": lambda key, n: _png(key, n, make_image(n, side=200)),
    "too_small": lambda key, n: _png(key, n, make_image(n, side=3)),
    "wrong_type": lambda key, n: _png(key, n, make_image(n), b'{"caption": 3}'),
}


def test_exact_counts_of_every_fault_in_samples(look: Look, tmp_path: Path) -> None:
    """Each reason in another number of samples, spread over two shards; nothing else is counted."""
    wanted = {reason: number for number, reason in enumerate(FAULTS, start=1)}
    bad = [FAULTS[reason](f"{reason}{i}", 1000 * n + i) for reason, n in wanted.items() for i in range(n)]
    good = [make_sample(f"good{i}", i) for i in range(40)]
    for shard in range(2):
        members = [member for sample in [*bad, *good][shard::2] for member in sample]
        write_tar(tmp_path / "tars" / f"{shard}.tar", members)
    code, report = look("tars", "full=true", "max_pixels=10000", "max_bad_share=1")
    assert (code, report["problems"]) == (0, [])
    assert report["faults"] == dict(sorted(wanted.items(), key=lambda item: (-item[1], item[0])))
    assert (report["usable"], report["samples"]) == (40, 40)
    assert report["usable_share"] == pytest.approx(40 / (40 + len(bad)))
    assert any("of the samples cannot be used" in text for text in report["warnings"])


def test_exact_counts_of_every_fault_in_shards(look: Look, tmp_path: Path) -> None:
    paths = write_numbers(tmp_path / "tars", [5, 5, 5])
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    paths[2].write_bytes(b"<html>not found</html>" * 100)
    twice = [*make_sample("same", 1), *make_sample("same", 2), *make_sample("other", 3)]
    write_tar(tmp_path / "tars" / "9.tar", twice)
    code, report = look("[tars,'tars/{5..6}.tar']", "full=true")
    assert code == 2
    (problem,) = report["problems"]
    assert problem.startswith("2 of 6 shards are not there or cannot be read (tars/5.tar, tars/6.tar)")
    assert report["faults"]["not_a_tar"] == 1
    assert report["faults"]["shard_missing"] == 2
    assert report["faults"]["duplicate_key"] == 1
    assert report["faults"]["truncated_shard"] >= 1
    assert set(report["faults"]) == {"not_a_tar", "shard_missing", "duplicate_key", "truncated_shard"}
    for text in ("2 shard(s) are not there", "1 shard(s) are no tars"):
        assert any(text in warning for warning in report["warnings"])


def test_a_missing_shard_is_found_beside_those_that_are_looked_at(look: Look, tmp_path: Path) -> None:
    paths = write_numbers(tmp_path / "tars", [3] * 9)
    paths[0].unlink()
    code, report = look("tars/{000000..000008}.tar", "max_shards=2")
    assert (code, report["faults"]) == (2, {})
    assert report["problems"][0].startswith("1 of 9 shards are not there or cannot be read (tars/000000.tar)")


@pytest.mark.parametrize(("bad", "code"), [(0, 0), (4, 0), (5, 2), (40, 2)])
def test_more_bad_samples_than_training_bears_end_with_2(look: Look, tmp_path: Path, bad: int, code: int) -> None:
    members = [m for i in range(80 - bad) for m in make_sample(f"good{i}", i)]
    members += [m for i in range(bad) for m in FAULTS["bad_json"](f"bad{i}", 100 + i)]
    write_tar(tmp_path / "tars" / "0.tar", members)
    found, report = look("tars")
    assert found == code
    assert [text.partition(" of the samples that would")[0] for text in report["problems"]] == (
        [f"{bad / 80:.1%}"] if code else []
    )
    assert look("tars", "max_bad_share=0.6")[0] == 0


@pytest.mark.parametrize("reason", ["missing_caption", "undecodable_image", "bad_json", "too_small"])
def test_nothing_usable_ends_with_2(look: Look, tmp_path: Path, reason: str) -> None:
    members = [member for i in range(6) for member in FAULTS[reason](f"{i}", i)]
    write_tar(tmp_path / "tars" / "0.tar", members)
    code, report = look("tars")
    assert code == 2
    assert report["problems"][0].startswith(f"no usable sample (6 {reason}")


def test_remote_shards_are_fetched_as_far_as_they_are_looked_at(look: Look, tmp_path: Path) -> None:
    write_numbers(tmp_path / "far", [6, 6, 6, 6])
    with serve_shards(tmp_path / "far") as server:
        source = server.url("{000000..000003}.tar")
        code, report = look(source, "cache=copies", "max_shards=2")
        assert (code, report["shards"], report["inspected"], report["samples"]) == (0, 4, 12, 24)
        assert sum(server.requests.values()) == 2
        _, again = look(source, "cache=copies", "max_shards=2")
        assert sum(server.requests.values()) == 2, "copies are used"
    assert again == report


def test_remote_faults_are_counted(look: Look, tmp_path: Path) -> None:
    write_numbers(tmp_path / "far", [6, 6, 6])
    with serve_shards(tmp_path / "far") as server:
        server.always = {"000000.tar": "half", "000001.tar": "hang"}
        code, report = look(server.url("{000000..000003}.tar"), "cache=copies", "timeout_s=0.5")
    assert code == 2
    assert report["problems"][0].startswith("1 of 4 shards are not there")
    assert report["faults"] == {"remote_incomplete": 1, "remote_timeout": 1, "shard_missing": 1}
    assert report["usable"] == 6


def test_stats_of_remote_shards(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_numbers(tmp_path / "far", [6])
    with serve_shards(tmp_path / "far") as server:
        assert start("stats", f"source={server.url('000000.tar')}", "cache=copies", "output=s.json", "workers=0") == 0
    assert "samples in en+zh" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["statistics"]["sample_languages"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["source=http://127.0.0.1:1/a.tar"], "cache=FOLDER"),
        (["source='pipe:cat a.tar'"], "cannot be read by offset"),
        (["source=http://127.0.0.1:1/a.tar", "cache=''"], "cache"),
        (["source=http://127.0.0.1:1/a.tar", "cache=c", "timeout_s=0"], "timeout_s=0: must be a number, above 0"),
        (["source=gone/*.tar"], "gone/*.tar: no file fits"),
        (["source=gone/{a,b}*.tar"], "gone/{a,b}*.tar: no file fits"),
        (["source=[tars,./tars/000000.tar]"], "tars/000000.tar comes twice"),
        (["source=[]"], "source=[]: must be"),
        (["source=empty"], "no *.tar there; it holds nothing"),
        (["source=photos"], "it holds 0.JPG; m2-data pack photos output=TARS packs pictures"),
        (["source=tars", "output=empty"], "output=empty: is a folder"),
        (["source=tars", "batchsize=3"], "did you mean batch_size"),
        (["source=tars", "batch_size=many"], "batch_size=many: must be a whole number"),
    ],
)
def test_mistakes_take_one_line(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    write_numbers(tmp_path / "tars", [3])
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.JPG").touch()
    assert start("check", *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert named in captured.err


def test_dots_in_names_are_named(look: Look, tmp_path: Path) -> None:
    members = [(f"photo.{n}.{kind}", content) for n in range(60) for kind, content in _files(n)]
    members += [(f"good{n}.{kind}", content) for n in range(60, 80) for kind, content in _files(n)]
    write_tar(tmp_path / "tars" / "0.tar", [*members, ("._good60.png", b"x"), ("__MACOSX/good60.png", b"x")])
    code, report = look("tars", "full=true")
    assert (code, report["samples"], report["usable_share"], report["faults"]) == (0, 80, 1.0, {})
    (warning,) = (text for text in report["warnings"] if "dots" in text)
    assert warning.startswith("60 of the samples read have dots in their names")
    assert not any("good60" in name for name in report["extensions"])


def test_pairs_that_are_lost_all_count(look: Look, tmp_path: Path) -> None:
    """3,000 names without a partner beside 1,000 good ones are not 99.9 % usable."""
    good = [(f"{n}.{kind}", content) for n in range(10) for kind, content in _files(n)]
    lost = [(f"photo.{n}.png", make_image(100 + n)) for n in range(30)] + [
        ("photo.30.txt", b"x"),
        ("photo.0.txt", b"x"),
    ]
    write_tar(tmp_path / "tars" / "0.tar", good + lost)
    _, report = look("tars", "full=true")
    assert report["faults"] == {"missing_caption": 29, "missing_image": 1}
    assert report["usable_share"] == pytest.approx(11 / 41)


def _files(number: int) -> list[tuple[str, bytes]]:
    return [("png", make_image(number)), ("txt", f"a picture of {number}".encode())]
