"""DistributedDataParallel whose contrastive loss looks at a group of the ranks: GBA-ITC with replicated weights."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.distributed.topology import GroupTopology
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.strategies.groups import ContrastiveGroups


class GroupedDDPStrategy(DDPStrategy):
    """Lightning's DDP; rows of the ranks of one group are negatives of each other. Gradients are averaged over all.

    Args:
        group_size: consecutive ranks per group; it divides the world and respects nodes. None: see `group_nodes`.
        group_nodes: whole nodes per group. With both None the world is one group: ordinary ITC.
        micro_batches: k: a rank's rows are encoded in so many pieces, with one loss over all of them.
        recompute: encode a micro-batch again in backward instead of keeping its activations.
        activation_checkpointing: keep only the input of every layer, and run the layer again in backward.
        **kwargs: what Lightning's `DDPStrategy` takes.

    Raises:
        UserError: for both ways of naming a group's size, or an impossible k.

    Reference: M2-Encoder (arXiv:2401.15896), grouped aggregation with batch accumulation.
    """

    @check_bounds
    def __init__(
        self,
        group_size: Count | None = None,
        group_nodes: Count | None = None,
        micro_batches: Count = 1,
        recompute: bool = True,
        activation_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._groups = ContrastiveGroups(group_size=group_size, group_nodes=group_nodes)
        self.micro_batches = micro_batches
        self.recompute = recompute
        self.activation_checkpointing = activation_checkpointing

    @property
    def contrastive_group(self) -> dist.ProcessGroup | None:
        """Ranks whose rows are negatives of this rank's; None for a group of one.

        Raises:
            RuntimeError: if read before the processes know each other.
        """
        return self._groups.group

    @property
    def topology(self) -> GroupTopology:
        """How the ranks are grouped.

        Raises:
            RuntimeError: if read before the processes know each other.
        """
        return self._groups.topology

    def setup_environment(self) -> None:
        """Start the processes, then group them.

        Raises:
            UserError: if the ranks cannot be grouped as wanted.
        """
        super().setup_environment()
        self._groups.create(ranks_per_node=self.num_processes, timeout=self._timeout)

    def parallelize(self, model: M2Encoder) -> None:
        """Prepare a freshly built model; Lightning replicates it later."""
        if self.activation_checkpointing:
            checkpoint_layers(model)

    def teardown(self) -> None:
        """Free the groups, then what Lightning made."""
        self._groups.destroy()
        super().teardown()
