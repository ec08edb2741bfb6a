"""Ends a run on all ranks when one of them fails: the others would wait in a collective call, some of them for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

import lightning
import torch
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.distributed.rank_watch import GOES_ON
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import UserError, abridge
from m2_encoder.strategies.groups import GroupedStrategy
from m2_encoder.strategies.meeting import STARTER_VARIABLE

_GONE: Final = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
    "recvValue failed",
)
_LOOK_S: Final = 0.5
_LAST_WORDS_S: Final = 5.0  # for a rank to say why it ends
_ALLOCATOR: Final = "DefaultCPUAllocator: "  # begins what torch says where memory of the CPU is short


class MemoryShortage(UserError):
    """A rank has not enough memory, of its device or of the machine."""


class StartedRanks:
    """The processes that this one starts to train with it: none before its trainer is there, or where others do."""

    def __init__(self) -> None:
        self.trainer: lightning.Trainer | None = None

    def end(self) -> None:
        """End them at once; softer signals do not reach a process that waits in a collective call, or is stopped."""
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)


def end_with_starter(ranks: StartedRanks) -> None:
    """Ends this process once the first rank has ended, if that has started it: a thread looks for it.

    The processes that a first rank starts from now on do the same.
    """
    starter = os.environ.get(STARTER_VARIABLE)
    if is_first_rank():
        os.environ[STARTER_VARIABLE] = str(os.getpid())
    elif starter is not None:
        threading.Thread(target=_follow, args=(int(starter), ranks), name="starter", daemon=True).start()


def _follow(starter: int, ranks: StartedRanks) -> None:
    while os.getppid() == starter:
        time.sleep(_LOOK_S)
    if ranks.trainer is not None and isinstance(ranks.trainer.strategy, GroupedStrategy):
        ranks.trainer.strategy.end_without_first()
    os._exit(1)


@contextlib.contextmanager
def watching(trainer: lightning.Trainer) -> Iterator[None]:
    """While inside, ranks watch each other; what is raised ends them all, in the words of the rank with the cause.

    Raises:
        UserError: instead of an error that only shows that another rank has ended, and for want of memory.
    """
    strategy = trainer.strategy
    with strategy.watching() if isinstance(strategy, GroupedStrategy) else contextlib.nullcontext():
        try:
            yield
        except SystemExit as end:
            if not isinstance(end, SIGTERMException) and isinstance(strategy.launcher, _SubprocessScriptLauncher):
                strategy.launcher.kill(signal.SIGKILL)  # before they notice that this one has ended, and say so
            raise
        except Exception as error:
            cause = translate_memory_error(error)
            other = end_together(trainer, cause or error) if trainer.world_size > 1 else None
            if (cause or other) is None:
                raise
            raise other or cause or error from error


def translate_memory_error(error: Exception) -> MemoryShortage | None:
    """What to say if there is not enough memory; None for other errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and _ALLOCATOR not in str(error):
        return None
    said = f" ({abridge(lines[-1], 200)})" if lines else ""
    return MemoryShortage(
        f"there is not enough memory{said}; give a smaller data.global_batch_size, more strategy.micro_batches, or "
        "strategy.activation_checkpointing=true; run.resume=auto goes on from the last checkpoint"
    )


def end_together(trainer: lightning.Trainer, error: Exception) -> UserError | None:
    """Ends the processes that this one has started, and makes sure that the rank with the cause says it.

    Returns what to raise instead of an error that only shows that another rank has ended; None for other errors.
    """
    is_elsewhere = any(words in str(error) for words in _GONE) and not isinstance(error, UserError)
    strategy, said = trainer.strategy, None
    if is_elsewhere and trainer.is_global_zero and isinstance(strategy, GroupedStrategy):
        said = strategy.explain_loss()
    if isinstance(strategy.launcher, _SubprocessScriptLauncher):
        end = time.monotonic() + _LAST_WORDS_S
        while is_elsewhere and time.monotonic() < end and all(each.poll() is None for each in strategy.launcher.procs):
            time.sleep(0.05)
        strategy.launcher.kill(signal.SIGKILL)  # softer ones do not reach a process that waits in a collective call
    if not is_elsewhere:
        is_own = trainer.train_dataloader is not None or isinstance(error, MemoryShortage)
        if isinstance(error, UserError) and not trainer.is_global_zero and is_own:
            # While batches are read; before that all ranks meet the same errors, and the first one says them.
            text = " ".join(str(error).split())
            print(abridge(f"m2-train: rank {trainer.global_rank}: {text}"), file=sys.stderr, flush=True)
        return None
    return UserError(said or f"another rank has ended; what it said stands above or in its own log. {GOES_ON}")
