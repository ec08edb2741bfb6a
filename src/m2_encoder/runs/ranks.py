"""Ends a run on all ranks when one of them fails: the others would wait in a collective call, some of them for ever."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Final

import lightning
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import UserError, abridge
from m2_encoder.strategies.meeting import STARTER_VARIABLE

_GONE: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LOOK_S: Final = 0.5
_LAST_WORDS_S: Final = 5.0  # for a rank to say why it ends


def end_with_starter() -> None:
    """Ends this process once the first rank has ended, if that has started it: a thread looks for it.

    The processes that a first rank starts from now on do the same.
    """
    starter = os.environ.get(STARTER_VARIABLE)
    if is_first_rank():
        os.environ[STARTER_VARIABLE] = str(os.getpid())
    elif starter is not None:
        threading.Thread(target=_follow, args=(int(starter),), name="starter", daemon=True).start()


def _follow(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_LOOK_S)
    os._exit(1)


class StartedRanks:
    """The processes that this one starts to train with it: none before its trainer is there, or where others do."""

    def __init__(self) -> None:
        self.trainer: lightning.Trainer | None = None

    def end(self) -> None:
        """End them at once; softer signals do not reach a process that waits in a collective call, or is stopped."""
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)


def end_together(trainer: lightning.Trainer, error: Exception) -> UserError | None:
    """Ends the processes that this one has started, and makes sure that the rank with the cause says it.

    Returns what to raise instead of an error that only shows that another rank has ended; None for other errors.
    """
    is_elsewhere = any(words in str(error) for words in _GONE) and not isinstance(error, UserError)
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        end = time.monotonic() + _LAST_WORDS_S
        while is_elsewhere and time.monotonic() < end and all(each.poll() is None for each in launcher.procs):
            time.sleep(0.05)
        launcher.kill(signal.SIGKILL)  # softer ones do not reach a process that waits in a collective call
    if not is_elsewhere:
        if isinstance(error, UserError) and not trainer.is_global_zero and trainer.train_dataloader is not None:
            # While batches are read; before that all ranks meet the same errors, and the first one says them.
            said = " ".join(str(error).split())
            print(abridge(f"m2-train: rank {trainer.global_rank}: {said}"), file=sys.stderr, flush=True)
        return None
    return UserError(f"rank {trainer.global_rank}: another rank has ended; what it said stands above or in its own log")
