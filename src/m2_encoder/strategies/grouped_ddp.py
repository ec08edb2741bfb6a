"""DistributedDataParallel whose contrastive loss looks at a group of the ranks: GBA-ITC with replicated weights."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from m2_encoder.strategies.groups import GroupedStrategy


class GroupedDDPStrategy(GroupedStrategy, DDPStrategy):
    """Lightning's DDP, with groups; gradients are averaged over all ranks. Arguments are those of both.

    Reference: M2-Encoder (arXiv:2401.15896), grouped aggregation with batch accumulation.
    """
