"""DistributedDataParallel with contrastive groups: GBA-ITC with replicated weights."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from m2_encoder.strategies.groups import GroupedStrategy


class GroupedDDPStrategy(GroupedStrategy, DDPStrategy):
    """DDP; gradients are averaged over all ranks. Takes the arguments of both bases.

    Reference: M2-Encoder (arXiv:2401.15896), grouped aggregation with batch accumulation.
    """
