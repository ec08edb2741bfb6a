"""When and where training states are saved."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps `step=<n>.ckpt` every so many steps and `last.ckpt` beside them.

    Args:
        folder: where; usually `outputs/<run.name>/checkpoints`.
        every_n_steps: optimizer steps between two checkpoints; the last step is always saved.
    """

    def __init__(self, *, folder: str | os.PathLike[str], every_n_steps: int) -> None:
        super().__init__(
            dirpath=Path(folder),
            filename="{step}",
            every_n_train_steps=every_n_steps,
            save_top_k=-1,
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
