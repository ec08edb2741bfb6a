"""Loops of `docs/grouped_elsewhere.md`, as they stand there, have the gradients of one process with all rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.elsewhere import LOOPS, PAGE, Case
from tests.support.readme import links, split_blocks

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = {"accelerate": "accelerate", "trainer": "transformers", "open_clip": "open_clip_train"}
TOLERANCE = 1e-12  # of the largest entry of a gradient, fp64

TWO_RANKS = [
    *(Case(loop, 2, pieces=4, drop=0.3) for loop in LOOPS),
    *(Case(loop, 1, pieces=2, drop=0.3) for loop in ("ddp", "strategy")),
    Case("ddp", 2),
    Case("open_clip", 2, accum_freq=4),
]
FOUR_RANKS = [
    *(Case(loop, g, pieces=k, drop=0.3) for loop in LOOPS for g, k in ((1, 4), (2, 1), (2, 2), (4, 4))),
    *(Case(loop, 4) for loop in LOOPS),
    *(Case("open_clip", g, accum_freq=k) for g, k in ((1, 2), (2, 4), (4, 2))),
]


def _is_installed(case: Case) -> bool:
    return importlib.util.find_spec(LIBRARY.get(case.loop, "torch")) is not None


def _run(cases: list[Case], world_size: int, folder: Path) -> dict[Case, float]:
    """How far each case is from one process."""
    given = json.dumps([case._asdict() for case in cases if _is_installed(case)])
    words = [sys.executable, "-m", "tests.support.elsewhere", str(world_size), str(folder), given]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return {Case(**each): off for each in found for off in [each.pop("deviation")]}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, float]:
    return _run(TWO_RANKS, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, float]:
    return _run(FOUR_RANKS, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case"),
    [*(("two_ranks", case) for case in TWO_RANKS), *(("four_ranks", case) for case in FOUR_RANKS)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, Case) else value,
)
def test_gradients_are_those_of_one_process(ranks: str, case: Case, request: pytest.FixtureRequest) -> None:
    if not _is_installed(case):
        pytest.skip(f"{LIBRARY[case.loop]} is not installed")
    measured: dict[Case, Any] = request.getfixturevalue(ranks)
    assert measured[case] <= TOLERANCE


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    blocks, prose = split_blocks(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == len(LOOPS)
    assert {block.kind for block in blocks} == {"python"}
    for target in links(prose):
        assert target.startswith("https://") or (PAGE.parent / target).is_file(), target
