"""Where the ranks of a run meet, and how one ends all of them."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection, _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import Store  # type: ignore[attr-defined,unused-ignore]

from m2_encoder.distributed.rank_watch import GOES_ON, Place, connect, is_stopped_process, serve
from m2_encoder.errors import UserError

STARTER_VARIABLE: Final = "M2_ENCODER_STARTER"
"""Environment variable for the processes that a first rank starts: its own process."""

_EXIT_CODE: Final = 2  # the user can mend it
_KNOCK_S: Final = 5.0  # of a try to reach the store
_PAUSE_S: Final = 0.2  # between two tries
_STORE_TIMEOUT: Final = timedelta(minutes=30)  # of a wait through the store; ranks that are gone are noticed before


class QuietLauncher(_SubprocessScriptLauncher):
    """Lightning's, which starts the later ranks of this machine, without its thread that looks whether they end.

    That thread kills this process without a word; `RankWatch` says which rank has ended, and how.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes, then call the function in this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def find_place(environment: ClusterEnvironment) -> Place:
    """Where the store is, by the launcher."""
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(environment.main_address, environment.main_port, is_served, f"m2_encoder/{attempt}")


def open_store(place: Place, *, rank: int, world_size: int, timeout_s: float, stopped_s: float) -> Store:
    """Serve the store, on the first rank of a run that no agent serves, or connect to it.

    Args:
        place: where it is.
        rank: this one.
        world_size: ranks.
        timeout_s: in which somebody has to serve it.
        stopped_s: the same if the process that has started this one is stopped; it is then ended with this one.

    Raises:
        UserError: if the port is taken, or nobody serves the store in time.
    """
    try:
        if rank == 0 and not place.is_served:
            store = serve(place, world_size=world_size)
        else:
            store = _knock(place, timeout_s=timeout_s, stopped_s=stopped_s)
    except RuntimeError as error:
        if rank == 0 and not place.is_served:
            rule = f"ranks cannot meet there ({_reason(error)})"
            fix = "end what uses that port, give another in MASTER_PORT, or unset that for a free one"
            raise UserError(f"{rule}; {fix}", key="MASTER_PORT", value=place.port) from error
        where = f"{place.host}:{place.port}"
        if _is_starter_stopped():
            end_process(f"at the start: rank 0 (pid {os.getppid()}) is stopped. {GOES_ON}", [], speaks=True)
        said = f"rank {rank}: nobody let it in at {where} within {timeout_s:g} s, where the first rank should be"
        said += "; look at that process and its machine, or give strategy.start_timeout_s more time"
        print(f"m2-train: {said}", file=sys.stderr, flush=True)  # the first rank alone speaks for a command
        raise UserError(said) from error
    store.set_timeout(_STORE_TIMEOUT)
    return store


def _knock(place: Place, *, timeout_s: float, stopped_s: float) -> Store:
    """Connect; in a thread, as a call to a store whose process is stopped may not come back, whatever its time-out."""
    stores: queue.SimpleQueue[Store] = queue.SimpleQueue()
    started = time.monotonic()
    threading.Thread(target=_try_to_connect, args=(place, stores, started + timeout_s), daemon=True).start()
    while True:
        try:
            return stores.get(timeout=_PAUSE_S)
        except queue.Empty:  # noqa: PERF203 - once per try
            waited = time.monotonic() - started
            if waited >= timeout_s or (waited >= stopped_s and _is_starter_stopped()):
                raise RuntimeError(f"no answer within {waited:.0f} s") from None


def _try_to_connect(place: Place, stores: queue.SimpleQueue[Store], deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            # First by a socket of our own: torch prints a stack of calls for each try in which nobody answers.
            socket.create_connection((place.host, place.port), timeout=_KNOCK_S).close()
            stores.put(connect(place, timeout_s=_KNOCK_S))
            return
        except (OSError, RuntimeError):  # noqa: PERF203 - once per try
            time.sleep(_PAUSE_S)


def _is_starter_stopped() -> bool:
    return os.environ.get(STARTER_VARIABLE) == str(os.getppid()) and is_stopped_process(os.getppid())


def meet(
    store: Store, device: torch.device, backend: str, *, rank: int, world_size: int, timeout: timedelta | None
) -> None:
    """Make the process group; collective over all ranks."""
    on_gpu = device.type != "cpu"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device if on_gpu else None
    )
    if backend == "nccl":
        atexit.register(_destroy_dist_connection)  # as Lightning does, against a warning of torch


def end_process(text: str | None, started: Sequence[int], *, speaks: bool) -> None:
    """Ends this process at once, with those of the same run that it knows: nothing softer reaches one that waits.

    Args:
        text: why.
        started: processes of later ranks, which this one has started.
        speaks: whether this rank says it; not each of many needs to.
    """
    if text is not None and speaks:
        with contextlib.suppress(OSError):
            os.write(2, f"m2-train: {text}\n".encode())
    starter = os.environ.get(STARTER_VARIABLE)
    with contextlib.suppress(OSError):
        if text is not None and not started and starter == str(os.getppid()):
            os.kill(os.getppid(), signal.SIGKILL)  # the first rank, which is stopped
    for pid in started:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(_EXIT_CODE)


def _reason(error: RuntimeError) -> str:
    return "the port is taken" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0][:200]
