"""Faults of processes: two of one run, and those that are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.locks import held_elsewhere
from tests.support.run_faults.case import SMALL, Place, RunFault, Told

Act = Callable[[Place], Told]
_LOCK = ".lock"


def two() -> tuple[RunFault, ...]:
    """Two processes of one run."""
    goes_on = ("continuing at step 2", "continues to step 3")
    return (
        RunFault("second start of a run while the first one lives", "a run of this name is at work", _second_start),
        RunFault("lock of a process that was killed", goes_on[0], _lock_of_a_dead_process, 0, goes_on[1]),
        RunFault(
            "lock of another machine",
            "its last start did not end by itself",
            _lock_of_a_machine,
            0,
            goes_on[1],
            is_slow=True,
        ),
        RunFault("lock file of garbage", goes_on[0], _garbage_as_lock, 0, goes_on[1], is_slow=True),
    )


def ended() -> tuple[RunFault, ...]:
    """Processes that are ended while they train."""
    saved = "the step is saved, and the run goes on from it"
    return (
        RunFault(
            "SIGTERM in a step", r"ended by SIGTERM, step \d+ is saved", _signal(signal.SIGTERM), 143, saved, 60, True
        ),
        RunFault(
            "Ctrl-C in a step", r"ended by SIGINT, step \d+ is saved", _signal(signal.SIGINT), 130, saved, 60, True
        ),
        RunFault(
            "SIGKILL in a step",
            "continuing at step N of",
            _killed,
            0,
            "the run goes on from its last checkpoint",
            60,
            True,
        ),
        RunFault("output closed, as by head", r"continuing at step", _closed_output, 0, "the run ends whole", 60, True),
    )


def ranks() -> tuple[RunFault, ...]:
    """One of two ranks; `strategy.rank_timeout_s` is 5 s here."""
    kept = "no rank is left, the run goes on from its last checkpoint"
    return (
        RunFault("rank that is killed in a step", r"m2-train: .*rank", _rank(signal.SIGKILL), 2, kept, 120, True),
        RunFault("rank that is stopped in a step", r"m2-train: .*rank", _rank(signal.SIGSTOP), 2, kept, 120, True),
        RunFault("SIGTERM to the first rank alone", "ended by SIGTERM", _rank(signal.SIGTERM, 0), 143, kept, 120, True),
    )


def _second_start(place: Place) -> Told:
    assert place.run.is_dir()
    with held_elsewhere(place.run / _LOCK):
        return place.told(place.resume)


def _going_on(place: Place) -> Told:
    done = place.resume()
    last = torch.load(place.checkpoints / "last.ckpt", weights_only=True)["global_step"]
    left = ", its lock is left" if (place.run / _LOCK).exists() else ""
    return Told(done.code, f"{done.out}\n{done.err}", f"continues to step {last}{left}")


def _lock_of_a_dead_process(place: Place) -> Told:
    with held_elsewhere(place.run / _LOCK):
        pass
    assert (place.run / _LOCK).is_file()
    return _going_on(place)


def _lock_of_a_machine(place: Place) -> Told:
    (place.run / _LOCK).write_text('{"host": "node-3", "pid": 17, "since": "2026-01-01 00:00:00"}')
    return _going_on(place)


def _garbage_as_lock(place: Place) -> Told:
    (place.run / _LOCK).write_bytes(b"\0\xff{")
    return _going_on(place)


def _start(place: Place, *lines: str, steps: int, out: int | None = None) -> subprocess.Popen[bytes]:
    """`m2-train` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "m2_encoder.cli.train", *SMALL, *place.where(), "run.name=new", "run.resume=auto",
        f"trainer.max_steps={steps}", *lines,
    ]  # fmt: skip
    with (place.folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log if out is None else out, stderr=log, start_new_session=True
        )


def _finish(process: subprocess.Popen[bytes], place: Place) -> Told:
    try:
        code = process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Told(code, (place.folder / "log").read_text(errors="replace"), "")


def _wait_for_a_step(process: subprocess.Popen[bytes], place: Place) -> None:
    path, deadline = place.folder / "new" / "metrics.jsonl", time.monotonic() + 60
    while not path.is_file() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, _finish(process, place).said[-2000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def _last_step(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


_RARELY = "run.checkpoint_every=100000"


def _signal(number: signal.Signals) -> Act:
    def act(place: Place) -> Told:
        process = _start(place, _RARELY, steps=100_000)
        _wait_for_a_step(process, place)
        os.killpg(process.pid, number)
        told = _finish(process, place)
        step = _last_step(place.folder / "new")
        again = _finish(_start(place, _RARELY, steps=step + 1), place)
        goes_on = again.code == 0 and f"continuing at step {step} of" in again.said
        return told._replace(kept="the step is saved, and the run goes on from it" if goes_on else again.said[-300:])

    return act


def _killed(place: Place) -> Told:
    process = _start(place, steps=100_000)
    _wait_for_a_step(process, place)
    os.killpg(process.pid, signal.SIGKILL)
    assert _finish(process, place).code == -signal.SIGKILL
    step = _last_step(place.folder / "new")
    again = _finish(_start(place, steps=step + 1), place)
    goes_on = step >= 2 and _last_step(place.folder / "new") == step + 1
    again = again._replace(said=again.said.replace(f"step {step} of {step + 1}", "step N of N + 1"))
    return again._replace(kept="the run goes on from its last checkpoint" if goes_on else "NOTHING")


def _closed_output(place: Place) -> Told:
    read, write = os.pipe()
    process = _start(place, steps=3, out=write)
    os.close(write)
    os.close(read)
    told = _finish(process, place)
    again = _finish(_start(place, steps=4), place)
    is_whole = told.code == 0 and _last_step(place.folder / "new") == 4
    return again._replace(kept="the run ends whole" if is_whole else "NOTHING")


def _rank(number: signal.Signals, rank: int = 1) -> Act:
    def act(place: Place) -> Told:
        two = ("strategy=ddp", "trainer.devices=2", "strategy.rank_timeout_s=5")
        process = _start(place, *two, steps=100_000)
        _wait_for_a_step(process, place)
        (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(child if rank else process.pid, number)
        code = process.wait(60)
        is_left = _lives(child)
        told = _finish(process, place)
        step = _last_step(place.folder / "new")
        again = _finish(_start(place, steps=step + 1), place)
        goes_on = "the run goes on from its last checkpoint" if again.code == 0 and step >= 2 else again.said[-500:]
        return told._replace(code=code, kept=f"{'A RANK IS' if is_left else 'no rank is'} left, {goes_on}")

    return act


def _lives(pid: int) -> bool:
    """Whether a process is still there after some seconds; one that nobody waited for is not."""
    for _ in range(100):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False
        if "State:\tZ" in status:
            return False
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return True
