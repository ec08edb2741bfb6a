"""Ends a run on all ranks when one of them fails: the others would wait in a collective call, some of them for ever."""

from __future__ import annotations

import signal
import sys
import time
from typing import Final

import lightning
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from m2_encoder.errors import UserError, abridge

_GONE: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LAST_WORDS_S: Final = 5.0  # for a rank to say why it ends


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
