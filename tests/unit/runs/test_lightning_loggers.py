"""`metrics.jsonl`: one object per step, whatever happens to the process."""

from __future__ import annotations

import errno
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.runs.lightning_loggers import JsonlLogger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_values_of_a_step_share_a_line(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_metrics({"train/loss/itc": 2.5, "samples_seen": 64.0, "epoch": 0}, step=2)
    logger.log_metrics({"val/x": 10.0}, step=2)
    logger.log_metrics({"train/loss/itc": 2.25, "samples_seen": 96.0, "epoch": 0}, step=3)
    logger.finalize("success")
    assert records(path) == [
        {"step": 2, "samples_seen": 64, "train/loss/itc": 2.5, "val/x": 10},
        {"step": 3, "samples_seen": 96, "train/loss/itc": 2.25},
    ]
    assert path.read_text().startswith('{"step": 2, "samples_seen": 64, '), "the head comes first"


def test_a_later_value_of_the_same_name_wins_even_if_its_line_gets_shorter(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_metrics({"a": 1.23456789, "b": 1.0}, step=1)
    logger.log_metrics({"a": 2.0}, step=1)
    assert records(path) == [{"step": 1, "a": 2, "b": 1}]


def test_lines_are_there_before_anything_is_closed(path: Path) -> None:
    # What a process that is killed now leaves behind.
    logger = JsonlLogger(path)
    for step in (1, 2):
        logger.log_metrics({"a": step}, step=step)
        assert [record["step"] for record in records(path)] == list(range(1, step + 1))


def test_what_json_cannot_say_is_left_out(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_metrics({"nan": math.nan, "inf": math.inf, "samples_seen": math.nan, "fine": 0.5}, step=1)
    logger.log_metrics({"fine": math.nan}, step=1)
    assert records(path) == [{"step": 1}]


def test_numbers_keep_their_precision(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_metrics({"samples_seen": 6_000_000_001.0, "third": 1 / 3, "tensor": torch.tensor(0.1)}, step=23_437_501)
    assert records(path) == [
        {"step": 23_437_501, "samples_seen": 6_000_000_001, "third": 1 / 3, "tensor": float(torch.tensor(0.1))}
    ]


def test_a_second_process_appends(path: Path) -> None:
    for step in (1, 2):
        logger = JsonlLogger(path)
        logger.log_metrics({"a": step}, step=step)
        logger.finalize("success")
    logger.log_metrics({"a": 3}, step=3)  # after it was closed
    assert [record["a"] for record in records(path)] == [1, 2, 3]


def test_resuming_drops_later_lines_and_what_a_crash_cut(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a": 3}\n{"step": 8, "samples_')
    logger = JsonlLogger(path)
    logger.resume_at(4)
    logger.log_metrics({"a": 9}, step=6)
    assert records(path) == [{"step": 2, "a": 1}, {"step": 4, "a": 2}, {"step": 6, "a": 9}]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "rest", ['{"step": 3', "5", "null", "[]", '{"a": 1}', '{"step": 1e999}\n', "[" * 100_000, "\x00\x00", "", "猫"]
)
def test_a_last_line_of_any_kind_is_survived(path: Path, rest: str) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1, "a": 1}\n' + rest.encode()[: max(1, len(rest.encode()) - 1)])
    JsonlLogger(path).resume_at(10)
    assert records(path) == [{"step": 1, "a": 1}]


def test_a_full_disk_names_the_file(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_metrics({"loss": 1.0}, step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            logger.log_metrics({"loss": 2.0}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    JsonlLogger(path).resume_at(2)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1]


def test_resuming_without_a_file_is_fine(path: Path) -> None:
    JsonlLogger(path).resume_at(5)
    assert not path.exists()


def test_nothing_is_written_before_something_is_logged(path: Path) -> None:
    logger = JsonlLogger(path)
    logger.log_hyperparams({"lr": 1})
    logger.save()
    logger.finalize("failed")
    assert not path.parent.exists()
