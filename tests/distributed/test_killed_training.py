"""Training on emoji that is killed twenty times, and ends as if nothing had happened.

Real `m2-train` command lines, two ranks, `kill -9` of every process of the run at random moments, while checkpoints are
written, too; each start continues by `run.resume=auto` with another number of loader processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import free_port
from tests.support.resuming import read_rows

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLS, MOST = 300, 5, 20, 14  # 20 lives of at most 14 steps do not reach the end
START_S = 120  # until the first step of a life

_SETTINGS = (
    "+experiment=emoji", "strategy=ddp", "cluster=torchrun", "logger=csv", "trainer.devices=2",
    "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=100",
    "trainer.log_every_n_steps=5",
    f"run.checkpoint_every={EVERY}", "run.resume=auto", "run.export=false", "data.global_batch_size=32",
    "model.image_size=16", "model.patch_size=8", "model.embed_dim=32", "model.num_heads=2", "model.num_layers=2",
    "model.feature_dim=16", "+model.drop_path_rate=0.2", "+callbacks.rows._target_=tests.support.resuming.RowRecorder",
)  # fmt: skip


def command(rank: int, port: int, arguments: list[str], log: str) -> None:
    """`m2-train` as torchrun starts it, in a session of its own, so that its workers can be killed with it."""
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="killed", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from m2_encoder.cli.train import main

    sys.argv = ["m2-train", *arguments]
    sys.exit(main())


class Life:
    """Both ranks of a run from a start to a kill, or to its end."""

    def __init__(self, folder: Path, emoji_folder: Path, *, workers: int) -> None:
        self.folder = folder
        self._log = folder.parent / f"{folder.name}.log"
        arguments = [
            *_SETTINGS, f"run.name={folder.name}", f"run.folder={folder.parent}", f"data.folder={emoji_folder}",
            f"data.num_workers={workers}", f"+callbacks.rows.folder={folder}/rows",
        ]  # fmt: skip
        port = free_port()
        # Forked from a process that has imported everything: twenty imports would take longer than the runs.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["m2_encoder.cli.train", "m2_encoder.data.emoji.emoji_module", "tests.support.resuming"]
        )
        self._steps_before = self._lines()
        self._ranks: list[Any] = [
            context.Process(target=command, args=(rank, port, arguments, str(self._log))) for rank in range(2)
        ]
        for rank in self._ranks:
            rank.start()

    def wait_for_steps(self, steps: int) -> None:
        """Until this life has trained so many."""
        deadline = time.monotonic() + START_S + steps
        while self._lines() - self._steps_before < steps:
            self._check(deadline)
            time.sleep(0.002)

    def wait_for_a_save(self) -> None:
        """Until a checkpoint is being written."""
        deadline = time.monotonic() + START_S
        checkpoints = self.folder / "checkpoints"
        while not checkpoints.is_dir() or not any(name.endswith(".tmp") for name in os.listdir(checkpoints)):
            self._check(deadline)

    def wait(self) -> None:
        """Until the run ends by itself."""
        for rank in self._ranks:
            rank.join(timeout=300)
            assert rank.exitcode == 0, self._tail()

    def kill(self) -> None:
        """All processes at once."""
        for rank in self._ranks:
            assert rank.exitcode is None, self._tail()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.kill()
            rank.join()

    def _lines(self) -> int:
        path = self.folder / "rows" / "rank0.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _check(self, deadline: float) -> None:
        assert all(rank.exitcode is None for rank in self._ranks), self._tail()
        assert time.monotonic() < deadline, f"no progress\n{self._tail()}"

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def read_end(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last checkpoint, and what was logged of the training."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in line.items() if not k.startswith(("perf/", "val/"))} for line in lines]


def differences(ours: Any, expected: Any, where: str = "") -> list[str]:
    """Names of what differs in two nested states, bit by bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(ours, expected) else [where]
    if isinstance(expected, dict):
        missing = [f"{where}.{key}" for key in expected.keys() ^ ours.keys()]
        return missing + [
            d for key in expected.keys() & ours.keys() for d in differences(ours[key], expected[key], f"{where}.{key}")
        ]
    if isinstance(expected, list | tuple) and len(ours) == len(expected):
        return [
            d for i, pair in enumerate(zip(ours, expected, strict=True)) for d in differences(*pair, f"{where}[{i}]")
        ]
    return [] if ours == expected else [f"{where}: {ours} instead of {expected}"]


def test_a_run_killed_twenty_times_ends_as_one_that_was_not(emoji_folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Life(whole, emoji_folder, workers=0).wait()
    choices = random.Random(20)
    saving = starting = 0
    for number in range(KILLS):
        life = Life(killed, emoji_folder, workers=number % 4)
        if number % 7 == 3:  # before anything happened, or little
            time.sleep(choices.uniform(0, 3))
        elif number % 3 == 0:
            life.wait_for_steps(choices.randint(1, MOST - EVERY))
            life.wait_for_a_save()
        else:
            life.wait_for_steps(choices.randint(1, MOST))
            time.sleep(choices.uniform(0, 0.05))
        before = life._lines()
        life.kill()
        saving += any(name.endswith(".tmp") for name in os.listdir(killed / "checkpoints"))
        starting += before == life._steps_before
    assert saving >= 3, "no kill met a checkpoint half-written"
    Life(killed, emoji_folder, workers=2).wait()

    expected, found = read_rows(whole / "rows"), read_rows(killed / "rows")
    assert sorted(expected) == sorted(found) == list(range(STEPS))
    assert all(len(times) == 1 for times in expected.values())
    assert sum(len(times) - 1 for times in found.values()) > KILLS, "nothing was trained again after a kill"
    for step, times in found.items():
        assert all(rows == expected[step][0] for rows in times), f"another global batch in step {step}"

    (ours, our_lines), (theirs, their_lines) = read_end(killed), read_end(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "skipped_samples", "global_step"):
        assert not differences(ours[part], theirs[part], part)
    assert our_lines == their_lines
    print(f"{KILLS} kills: {saving} while saving, {starting} before a step; ", end="")
    print(f"{sum(map(len, found.values()))} steps for {STEPS}")
