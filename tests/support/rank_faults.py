"""What happens to one rank of a real `m2-train`: it is stopped, killed, or raises, at a given moment."""

from __future__ import annotations

import builtins
import os
import signal
from typing import Any

from lightning.pytorch.callbacks import Callback

from m2_encoder.errors import CheckpointError
from m2_encoder.files import atomic_file


class RankFault(Callback):
    """Something happens to a rank.

    Args:
        rank: whose.
        moment: "start" (before the ranks meet), "setup", "step", "backward", "validation", "saving", "writing" (half of
            the file is there) or "end".
        act: the name of a signal that the process gets, or of an error that it raises.
        step: optimizer steps that are done before, if there are any.
    """

    def __init__(self, *, rank: int, moment: str, act: str, step: int = 0) -> None:
        self._is_mine = int(os.environ.get("LOCAL_RANK", "0")) == rank
        self._moment, self._act, self._step = moment, act, step
        self._do("start", step)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._do("setup", self._step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._do("step", trainer.global_step)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._do("backward", trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._do("validation", trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._do("saving", trainer.global_step)
        if self._is_mine and self._moment == "writing" and trainer.global_step >= self._step:
            trainer.strategy.checkpoint_io.save_checkpoint = self._write_half

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._do("end", trainer.global_step)

    def _write_half(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with atomic_file(path, error=CheckpointError) as temporary:
            temporary.write_bytes(b"half")
            self._do("writing", self._step)

    def _do(self, moment: str, step: int) -> None:
        if not self._is_mine or moment != self._moment or step < self._step:
            return
        if self._act.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self._act])
        else:
            raise getattr(builtins, self._act)(f"{self._act} of rank {os.environ.get('LOCAL_RANK', '0')}")
