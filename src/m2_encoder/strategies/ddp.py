"""DistributedDataParallel whose contrastive group is the whole world: ordinary full-batch ITC."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy


class WorldDDPStrategy(DDPStrategy):
    """Lightning's DDP; every rank's rows are negatives of every other's."""

    @property
    def contrastive_group(self) -> dist.ProcessGroup | None:
        """All ranks; None when there is only one.

        Raises:
            RuntimeError: if read before the processes know each other.
        """
        if not dist.is_initialized():
            raise RuntimeError("contrastive_group exists only after the strategy has set up the processes")
        return dist.group.WORLD if dist.get_world_size() > 1 else None
