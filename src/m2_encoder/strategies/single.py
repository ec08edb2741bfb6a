"""One process on one device."""

from __future__ import annotations

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.models.two_towers import Encoder
from m2_encoder.strategies.micro_batches import check_micro_batches


class LocalStrategy(SingleDeviceStrategy):
    """The first CUDA device or the CPU, without process groups; other arguments as in `GroupedStrategy`.

    Args:
        accelerator: "auto", "cpu" or "cuda"/"gpu".
    """

    @check_bounds
    def __init__(
        self,
        accelerator: str = "auto",
        micro_batches: Count = 1,
        recompute: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        wants_cuda = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
        super().__init__(device="cuda:0" if wants_cuda else "cpu")
        self.micro_batches = micro_batches
        self.recompute = recompute
        self.activation_checkpointing = activation_checkpointing

    def connect(self, model: lightning.LightningModule) -> None:
        """Take the module, before anything is started.

        Raises:
            UserError: if it would ignore `micro_batches`.
        """
        check_micro_batches(self.micro_batches, model)
        super().connect(model)

    @property
    def contrastive_group(self) -> dist.ProcessGroup | None:
        """None: there are no other ranks."""
        return None

    def parallelize(self, model: Encoder) -> None:
        """Prepare a freshly built model."""
        if self.activation_checkpointing:
            checkpoint_layers(model)
