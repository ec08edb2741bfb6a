"""Runs a function in several processes that form a gloo world, with a time-out, and brings back what they return."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Imported once, by the server from which every rank is forked: a fresh process would spend seconds on them.
_PRELOADED = (
    "torch.distributed",
    "lightning.pytorch",
    "m2_encoder.training.module",
    "m2_encoder.data.emoji.emoji_module",
)


class _Report(NamedTuple):
    rank: int
    result: Any
    error: str | None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, folder: Path, timeout_s: float = 180.0
) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes that share a gloo process group.

    Args:
        function: module-level, so that another process can import it.
        world_size: number of processes.
        args: handed to each.
        folder: an empty one; the processes meet through a file in it, so no port can be taken.
        timeout_s: after this everything is killed and the test fails, instead of hanging.

    Returns:
        What each rank returned, by rank. Plain values or NumPy arrays.
    """
    return _run(_in_group, world_size, (str(folder / "store"), world_size, function, args), timeout_s)


def run_lightning_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0
) -> list[Any]:
    """The same for a function that builds a Lightning Trainer, which makes its own process group."""
    return _run(_in_lightning, world_size, (free_port(), world_size, function, args), timeout_s)


def fork_context() -> ForkServerContext:
    """Of processes that are forked from one server, which has imported what most of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel hands out: nobody else gets it before it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def _run(target: Callable[..., None], world_size: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    context = fork_context()
    reports: Any = context.Queue()
    processes = [context.Process(target=target, args=(rank, reports, *args)) for rank in range(world_size)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world_size:
            try:
                report = reports.get(timeout=0.2)
            except Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                assert not dead, f"ranks died with {dead}"
                assert time.monotonic() < deadline, f"ranks {sorted(results)} of {world_size} done after {timeout_s} s"
                continue
            assert report.error is None, f"rank {report.rank}:\n{report.error}"
            results[report.rank] = report.result
    finally:
        for process in processes:
            process.join(timeout=5 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _in_group(
    rank: int, reports: Any, store: str, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    def body() -> Any:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        try:
            return function(rank, *args)
        finally:
            dist.destroy_process_group()

    _report(rank, reports, body)


def _in_lightning(
    rank: int, reports: Any, port: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
    )
    _report(rank, reports, lambda: function(rank, *args))


def _report(rank: int, reports: Any, body: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    try:
        report = _Report(rank, body(), None)
    except BaseException:  # whatever it is, the parent shows it
        report = _Report(rank, None, traceback.format_exc())
    reports.put(report)
