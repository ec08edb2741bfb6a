"""What hangs or dies is named in time, wherever the main thread is."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from unittest.mock import Mock

import pytest
from torch.utils.data import DataLoader

from m2_encoder.data.loading.stages import StageBoard
from m2_encoder.data.loading.stream import Delivery
from m2_encoder.errors import UserError
from tests.unit.data.loading.test_loader import Numbers, number_loader


def test_a_worker_that_is_killed_during_a_step_is_told_when_a_batch_is_due() -> None:
    others = multiprocessing.active_children()  # pools that earlier tests have left
    batches = iter(number_loader(num_workers=2, num_steps=1000))
    next(batches)
    workers = sorted(set(multiprocessing.active_children()) - set(others), key=lambda worker: worker.name)
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # the step; torch's own handler would raise in it
        pass
    with pytest.raises(UserError, match=r"a worker of the data loader died.*worker 0: .*try fewer data.num_workers"):
        list(batches)


class _FullMemory(Numbers):
    """What torch says in a worker where `/dev/shm` is full."""

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_17582_4222982951_0>: No space left on device (28)"
        )


class _BusError(Numbers):
    """What the system does where the memory is given out before it is there."""

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest has one of its own
        os.kill(os.getpid(), signal.SIGBUS)
        return iter(())


@pytest.mark.parametrize("numbers", [_FullMemory(), _BusError()])
def test_a_lack_of_shared_memory_is_told_with_two_ways_out(numbers: Numbers) -> None:
    with pytest.raises(UserError, match=r"^/dev/shm, .* is full or too small .*data\.num_workers=0, .*--shm-size=8g$"):
        list(number_loader(numbers, num_workers=1))


def test_too_little_shared_memory_for_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(DataLoader, "__iter__", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"/dev/shm, .* is full or too small"):
        list(number_loader(num_workers=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_stopped_is_told_in_time_and_ended(workers: int) -> None:
    others = multiprocessing.active_children()
    batches = iter(number_loader(num_workers=workers, num_steps=1000, stall_timeout_s=1))
    next(batches)
    (stopped, *_) = set(multiprocessing.active_children()) - set(others)
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"loading data stands still for 1 s: waiting for worker"):
        list(batches)
    assert time.monotonic() - started < 10
    stopped.join(10)
    assert stopped.exitcode == -signal.SIGKILL


def test_a_worker_that_never_enters_a_stage_does_not_pass_for_one_that_moves() -> None:
    board = StageBoard(1)
    time.sleep(0.05)
    now = board.read(0)
    assert (now.stage, now.detail) == ("starting", "")
    assert now.seconds >= 0.05
