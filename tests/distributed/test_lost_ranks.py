"""`m2-train` on two ranks, one of which is stopped, killed or fails: a line says in time who, where and what now."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.checkpoints.training_state import find_newest

START_S = 240  # for two processes to import everything, on a busy machine
TIMEOUT_S = 5
EVERY = 2  # steps between checkpoints
GONE_S = 5.0  # what the kernel takes for a process that was killed
NOBODY = 9  # a rank that there is not


class Run:
    """The command line as a user gives it, in a process group of its own."""

    def __init__(self, folder: Path, emoji_folder: Path, *more: str, **environment: str) -> None:
        self.folder = folder / "run"
        arguments = [
            "+experiment=smoke", "run.name=run", f"run.folder={folder}", f"data.folder={emoji_folder}",
            "data.num_workers=0", "strategy=ddp", "trainer.devices=2", f"strategy.rank_timeout_s={TIMEOUT_S}",
            "run.export=false", f"run.checkpoint_every={EVERY}", "trainer.max_steps=6", "trainer.val_check_interval=4",
            "model.num_layers=1", "run.resume=auto", *more,
        ]  # fmt: skip
        settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m2_encoder.cli.train", *arguments],
            env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        """Exit code, what was printed, and what was said on stderr; no process is left."""
        try:
            out, said = self.process.communicate(timeout=START_S)
            deadline = time.monotonic() + GONE_S
            while self.living() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not self.living(), "a process is left behind"
        finally:
            if self.living():
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        return self.process.returncode, out, said

    def living(self) -> list[int]:
        """Processes of this run; those that have ended and that nobody has asked about are none."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return found

    def wait_for_second(self) -> int:
        """Until the second rank is there; its process."""
        deadline = time.monotonic() + START_S
        while not (others := [pid for pid in self.living() if _is_second(pid)]):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return others[0]


def _is_second(pid: int) -> bool:
    try:
        return b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def fault(moment: str, act: str, *, rank: int = 1, step: int = 4) -> list[str]:
    values = {"_target_": "tests.support.rank_faults.RankFault", "rank": rank, "moment": moment, "act": act}
    return [f"+callbacks.fault.{key}={value}" for key, value in {**values, "step": step}.items()]


def check(said: str, expected: str) -> None:
    """One line on stderr, which matches."""
    lines = said.splitlines()
    assert len(lines) == 1, said[-3000:]
    assert re.match(expected, lines[0]), lines[0]
    assert "; run.resume=auto goes on from its last checkpoint" in lines[0].replace(". The run ends", "")
    assert len(lines[0]) <= 500


SILENT, KILLED = r"has given no sign of life for \d+ s\.", r"was killed by SIGKILL, often for want of memory\."
WHO = r"rank 1 \(pid \d+ on \S+, last seen at [^)]+\)"
EARLY = r"rank 1 \((not there yet|pid [^)]+)\)"  # a sign a second
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "act", "where", "who"),
    [
        ("step", "SIGKILL", "step 5", WHO),
        pytest.param("step", "SIGSTOP", "step 5", WHO, marks=SLOW),
        pytest.param("start", "SIGKILL", "the start", r"rank 1 \(not there yet\)", marks=SLOW),
        pytest.param("backward", "SIGSTOP", "step 5", WHO, marks=SLOW),
        pytest.param("validation", "SIGSTOP", "validation, after step 4", WHO, marks=SLOW),
        pytest.param("validation", "SIGKILL", "validation, after step 4", WHO, marks=SLOW),
        pytest.param("saving", "SIGSTOP", "saving, after step 4", WHO, marks=SLOW),
        pytest.param("saving", "SIGKILL", "saving, after step 4", WHO, marks=SLOW),
        pytest.param("start", "SIGSTOP", "the start", r"rank 1 \(not there yet\)", marks=SLOW),
        pytest.param("setup", "SIGSTOP", "the start", EARLY, marks=SLOW),
        pytest.param("setup", "SIGKILL", "the start", EARLY, marks=SLOW),
    ],
)
def test_a_second_rank_that_is_lost(
    emoji_folder: Path, tmp_path: Path, moment: str, act: str, where: str, who: str
) -> None:
    code, _, said = Run(tmp_path, emoji_folder, *fault(moment, act)).end()
    check(said, rf"m2-train: at {where}: {who} {SILENT if act == 'SIGSTOP' else KILLED}")
    assert code == 2
    newest = find_newest(tmp_path / "run" / "checkpoints")
    assert (0 if newest is None else newest.step) == {"start": 0, "setup": 0, "saving": 2}.get(moment, 4)


@SLOW
@pytest.mark.parametrize("act", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize(
    ("moment", "where", "left"),
    [("step", "step 5", 4), ("validation", "validation, after step 4", 4), ("writing", "saving, after step 4", 2)],
)
def test_a_first_rank_that_is_lost_and_the_run_that_goes_on(
    emoji_folder: Path, tmp_path: Path, moment: str, act: str, where: str, left: int
) -> None:
    code, _, said = Run(tmp_path, emoji_folder, *fault(moment, act, rank=0)).end()
    ended = SILENT if act == "SIGSTOP" else r"has ended\."
    check(said, rf"m2-train: at {where}: rank 0(, which had started this one,| \(pid .*\)) {ended}")
    assert code == -signal.SIGKILL
    newest = find_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == left
    code, out, said = Run(tmp_path, emoji_folder, *fault(moment, act, rank=NOBODY)).end()
    assert code == 0, said[-3000:]
    assert f"continuing at step {left} of 6" in out


@SLOW
@pytest.mark.parametrize(("act", "how"), [("SIGSTOP", SILENT[:-2]), ("SIGKILL", KILLED[:-2])])
def test_a_rank_that_is_lost_after_the_last_step_does_not_cost_the_report(
    emoji_folder: Path, tmp_path: Path, act: str, how: str
) -> None:
    code, out, said = Run(tmp_path, emoji_folder, *fault("end", act)).end()
    assert code == 0, said[-3000:]
    assert "Retrieval, percent" in out
    assert re.fullmatch(rf"m2-train: {WHO} {how}, after all steps were done\n", said)


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("moment", "step"), [("setup", 0), ("step", 4), ("validation", 4)])
def test_a_rank_without_memory(emoji_folder: Path, tmp_path: Path, rank: int, moment: str, step: int) -> None:
    code, _, said = Run(tmp_path, emoji_folder, *fault(moment, "MemoryError", rank=rank, step=step)).end()
    assert code == 2
    first, *others = said.splitlines()
    prefix = "rank 1: " if rank else ""
    assert first.startswith(
        f"m2-train: {prefix}there is not enough memory (MemoryError of rank {rank}); give a smaller"
    )
    assert len(others) == rank, said[-3000:]
    assert "Traceback" not in said


@SLOW
def test_an_error_of_the_second_rank_is_the_one_that_is_shown(emoji_folder: Path, tmp_path: Path) -> None:
    code, _, said = Run(tmp_path, emoji_folder, *fault("step", "RuntimeError")).end()
    assert code == 2
    assert "RuntimeError: RuntimeError of rank 1\n" in said
    assert said.count("Traceback (most recent call last)") == 1
    last = said.splitlines()[-1]
    assert re.match(rf"m2-train: at step 5: {WHO} has ended with exit code 1; what it said stands above", last)


@SLOW
@pytest.mark.parametrize(("number", "delay_s"), [(signal.SIGTERM, 0.5), (signal.SIGTERM, 2.0), (signal.SIGSTOP, 0.5)])
def test_a_first_rank_that_is_signalled_while_the_second_one_starts(
    emoji_folder: Path, tmp_path: Path, number: signal.Signals, delay_s: float
) -> None:
    run = Run(tmp_path, emoji_folder)
    run.wait_for_second()
    time.sleep(delay_s)
    os.kill(run.process.pid, number)
    started = time.monotonic()
    code, _, said = run.end()
    if number == signal.SIGTERM:
        assert code == 143
        assert said == "m2-train: ended by SIGTERM; run.resume=auto goes on from the last checkpoint\n"
        assert time.monotonic() - started < 30
    else:
        assert code == -signal.SIGKILL
        assert re.fullmatch(r"m2-train: at the start: rank 0 .*(is stopped|sign of life).* run\.resume=auto .*\n", said)


@SLOW
def test_a_first_rank_that_never_comes(emoji_folder: Path, tmp_path: Path) -> None:
    place = {"RANK": 1, "LOCAL_RANK": 1, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29987}
    values: dict[str, Any] = {**place, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "lost"}
    environment = {key: str(value) for key, value in values.items()}
    run = Run(tmp_path, emoji_folder, "cluster=torchrun", "strategy.start_timeout_s=6", **environment)
    code, _, said = run.end()
    assert code == 2
    assert re.fullmatch(
        r"m2-train: rank 1: nobody let it in at 127\.0\.0\.1:29987 within 6 s, .*start_timeout_s.*\n", said
    )
