"""Signals to a run that trains nothing at that moment, or does not listen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from m2_encoder.runs import signals
from m2_encoder.runs.ranks import StartedRanks
from m2_encoder.runs.signals import end_on_signals


@contextlib.contextmanager
def process(body: Callable[[], None], end: Callable[[], None] = lambda: None) -> Iterator[int]:
    """A forked process within `end_on_signals`, once it is there."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with end_on_signals(end):
                os.write(write, b"x")
                body()
            code = 0
        except SystemExit as stop:
            code = int(str(stop.code))
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    assert os.read(read, 1) == b"x"
    time.sleep(0.1)  # by then its body runs
    os.close(read)
    os.close(write)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def deaf() -> None:
    """Never ends, whatever is raised in it; as a process that waits in a collective call."""
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_what_hears_it(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with process(lambda: time.sleep(60)) as pid:
        os.kill(pid, number)
        assert code_of(pid) == 128 + number
    said = f"m2-train: ended by {number.name}; run.resume=auto goes on from the last checkpoint\n"
    assert capfd.readouterr().err == (said if number != signal.SIGINT else ""), "the command says the other"


def test_a_closed_terminal_is_ignored_where_nohup_wants_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process(lambda: time.sleep(0.3)) as pid:
            os.kill(pid, signal.SIGHUP)
            assert code_of(pid) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_hear_it_is_ended_with_what_it_started(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "_GRACE_S", 0.3)
    with process(deaf, lambda: print("ranks end", file=sys.stderr, flush=True)) as pid:
        os.kill(pid, number)
        assert code_of(pid) == 128 + number
    said = f"ranks end\nm2-train: ended by {number.name}; run.resume=auto goes on from the last checkpoint\n"
    assert capfd.readouterr().err == said


def test_a_started_rank_is_ended_even_if_it_is_stopped() -> None:
    ranks = StartedRanks()
    ranks.end()
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]
    launcher.procs[0].send_signal(signal.SIGSTOP)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    ranks.trainer = trainer
    ranks.end()
    assert launcher.procs[0].wait(timeout=10) == -signal.SIGKILL


def test_a_second_interrupt_ends_at_once() -> None:
    with process(deaf) as pid:
        started = time.monotonic()
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.1)
        assert code_of(pid) == 130
        assert time.monotonic() - started < 3, "less than the time that it has to end by itself"


def test_everything_is_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with end_on_signals(lambda: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_process_that_goes_on_keeps_nothing_waiting() -> None:
    def fork_and_end() -> None:
        if os.fork() == 0:  # with a copy of the socket that the thread listens to
            time.sleep(2)
            os._exit(0)

    with process(fork_and_end) as pid:
        started = time.monotonic()
        assert code_of(pid) == 0
        assert time.monotonic() - started < 1.5
