"""What hangs or dies is named in time, wherever the main thread is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2_encoder.data.loading.watchdog import map_watched
from m2_encoder.data.order.manifest import SourceSpec, build_manifest
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.errors import UserError
from tests.support.shards import write_numbers
from tests.unit.data.loading.test_loader import number_loader


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


def test_results_come_in_their_order_and_errors_as_they_are() -> None:
    def halve(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        if number % 2:
            raise UserError(f"{number} is odd")
        return number // 2

    def run(items: list[int], threads: int) -> list[int]:
        return map_watched(halve, items, threads=threads, timeout_s=5, describe=str)

    assert run([0, 2, 4, 6, 8, 10, 12], 3) == list(range(7))
    assert run([], 3) == []
    with pytest.raises(UserError, match="7 is odd"):
        run([0, 2, 4, 7, 8], 2)


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_an_item_that_hangs_is_named_and_left_behind(hanging: threading.Event) -> None:
    def work(name: str) -> str:
        if name.startswith("slow"):
            hanging.wait(30)
        return name

    def run(*names: str) -> list[str]:
        return map_watched(
            work, names, threads=2, timeout_s=0.3, describe=lambda name: None if name.endswith("?") else name
        )

    started = time.monotonic()
    with pytest.raises(UserError, match=r"stands still for 0.3 s: waiting for slow.tar; look at that disk, or give"):
        run("a", "slow.tar", "b", "c")
    assert time.monotonic() - started < 3
    threading.Timer(0.8, hanging.set).start()
    assert run("slow?", "b") == ["slow?", "b"]


def test_a_pipe_instead_of_a_shard_does_not_hang_the_start(tmp_path: Path) -> None:
    write_numbers(tmp_path, [3])
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"1 of 2 shards cannot be read: .*pipe.tar \(not an ordinary file\)"):
        build_manifest([SourceSpec("a", str(tmp_path))], measure=ShardReader().measure)
