from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2_encoder.data.order.manifest import SourceSpec, build_manifest
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.data.worker_pool import map_in_processes, map_watched
from m2_encoder.errors import UserError
from tests.support.shards import write_numbers

PROGRAM = """
import os, sys, time
from m2_encoder.data.worker_pool import map_in_processes

def work(folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(120)

if __name__ == "__main__":
    list(map_in_processes(work, [sys.argv[1]], workers=1, preload="json"))
"""


def double(number: int) -> int:
    return 2 * number


def die(_: int) -> int:
    os._exit(1)


def fail(number: int) -> int:
    raise UserError(f"number {number} is wrong")


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers: int) -> None:
    found = map_in_processes(double, range(20), workers=workers, preload="json")
    assert list(found) == [2 * number for number in range(20)]


def test_tasks_are_taken_as_needed() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = map_in_processes(double, endless(), workers=1, preload="json")
    assert [next(results) for _ in range(5)] == [2, 4, 6, 8, 10]
    results.close()
    assert taken < 10


def test_death_of_a_worker_is_no_hang() -> None:
    with pytest.raises(UserError, match="a worker process died"):
        list(map_in_processes(die, range(3), workers=1, preload="json"))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive(workers: int) -> None:
    with pytest.raises(UserError, match="number 1 is wrong"):
        list(map_in_processes(fail, [1], workers=workers, preload="json"))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Otherwise one could go on writing into the output of the run that is started again."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "ids").mkdir()
    with subprocess.Popen([sys.executable, str(script), str(tmp_path / "ids")]) as parent:
        worker = int(_wait_for(lambda: next((tmp_path / "ids").iterdir(), None)).name)
        parent.send_signal(signal.SIGKILL)
    _wait_for(lambda: None if _is_alive(worker) else True)


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _wait_for(look, limit_s: float = 60.0):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + limit_s
    while (found := look()) is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


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
