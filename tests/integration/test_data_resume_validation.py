"""Interrupted runs with validation in between, and over many epochs of a small source that is kept decoded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.images.transforms import TrainTransform, open_image
from tests.support.resuming import fit, furthest, read_rows
from tests.support.shards import write_numbers
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 12
NOISE = 0.3  # of stochastic depth: validation must not draw from the generator of training

# As `data=emoji` has it.
SMALL = {
    "lanes": 1,
    "window": 1 << 40,
    "keep_decoded": True,
    "decode": open_image,
    "transform": partial(TrainTransform, scale=(0.6, 1.0), flip=0.5, num_ops=1),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_numbers(folder / "a", [25, 25])
    write_numbers(folder / "b", [30], first=100)  # the name of a mixture's second source: nothing else is written
    write_numbers(folder / "val", [40], first=300)
    return folder


def run(folder: Path, shards: Path, *, data: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    values = {"validation": {"val": str(shards / "val")}, "eval_batch_size": 16, **(data or {})}
    return fit(folder, shards, steps=STEPS, drop_path_rate=NOISE, data=values, **given)


def rows_of(folder: Path) -> dict[int, list[str]]:
    return {step: rows for step, (rows,) in read_rows(folder / "rows").items()}


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, list[str]]]:
    folder = tmp_path_factory.mktemp("whole")
    result = run(folder, shards, limit_val_batches=1.0, val_check_interval=3)
    return result, rows_of(folder)


@pytest.mark.parametrize(
    ("stop", "first", "second"),
    [
        (6, {"limit_val_batches": 1.0, "val_check_interval": 3}, {"limit_val_batches": 2, "val_check_interval": 3}),
        (7, {"limit_val_batches": 1, "val_check_interval": 2}, {"limit_val_batches": 0}),
        (5, {"limit_val_batches": 0}, {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 2}),
        (4, {"limit_val_batches": 1, "num_sanity_val_steps": -1}, {"limit_val_batches": 1, "val_check_interval": 1}),
    ],
    ids=["at-validation", "dropped", "sanity", "every-step"],
)
@pytest.mark.parametrize("ends", ["stop", pytest.param("terminate", marks=pytest.mark.slow)])
def test_validation_moves_nothing(
    whole: tuple[dict[str, Any], dict[int, list[str]]],
    shards: Path,
    tmp_path: Path,
    stop: int,
    first: dict[str, Any],
    second: dict[str, Any],
    ends: str,
) -> None:
    end: Any = {"stop": stop} if ends == "stop" else {"terminate": (stop, 0)}
    begun = run(tmp_path / "first", shards, data={"num_workers": 2}, **end, **first)
    assert begun["step"] == stop
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    rest = run(tmp_path / "second", shards, resume=last, **second)
    assert rows_of(tmp_path / "first") | rows_of(tmp_path / "second") == whole[1]
    assert not rows_of(tmp_path / "first").keys() & rows_of(tmp_path / "second").keys()
    assert furthest(rest["weights"], whole[0]["weights"]) == 0


@pytest.mark.parametrize("stop", [2, 7])
def test_many_epochs_of_a_small_source(shards: Path, tmp_path: Path, stop: int) -> None:
    data = {**SMALL, "global_batch_size": 48, "sources": {"emoji": {"shards": f"{shards}/a/*.tar"}}}
    expected = run(tmp_path / "whole", shards, data=data)
    run(tmp_path / "first", shards, data={**data, "num_workers": 2}, stop=stop)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    rest = run(tmp_path / "second", shards, data={**data, "num_workers": 1}, resume=last)
    rows = rows_of(tmp_path / "first") | rows_of(tmp_path / "second")
    assert rows == rows_of(tmp_path / "whole")
    assert furthest(rest["weights"], expected["weights"]) == 0
    keys = [row.split("/")[1] for step in range(STEPS) for row in rows[step]]
    assert len(keys) == 48 * STEPS > 11 * 50
    for epoch in range(11):
        assert len(set(keys[50 * epoch : 50 * epoch + 50])) == 50
    assert len({row for step in range(STEPS) for row in rows[step]}) > 500, "augmented alike in every epoch"
