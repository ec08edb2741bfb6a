"""One process on one device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy


class LocalStrategy(SingleDeviceStrategy):
    """The first accelerator if there is one and it is wanted, else the CPU; no process groups.

    Args:
        accelerator: "auto", "cpu" or "cuda"/"gpu".
    """

    def __init__(self, accelerator: str = "auto") -> None:
        wants_cuda = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
        super().__init__(device="cuda:0" if wants_cuda else "cpu")

    @property
    def contrastive_group(self) -> dist.ProcessGroup | None:
        """None: this rank's rows are all there are."""
        return None
