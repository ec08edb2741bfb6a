"""Base of strategies for many ranks: contrastive process groups, and batch accumulation."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.distributed.topology import GroupTopology, resolve_group_size
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers


class ContrastiveGroups:
    """The contrastive process groups of one run; arguments as in `GroupedStrategy`.

    Raises:
        UserError: if both are given.
    """

    def __init__(self, *, group_size: int | None, group_nodes: int | None) -> None:
        if group_size is not None and group_nodes is not None:
            resolve_group_size(world_size=1, ranks_per_node=1, group_size=group_size, group_nodes=group_nodes)
        self._group_size = group_size
        self._group_nodes = group_nodes
        self._topology: GroupTopology | None = None
        self._group: dist.ProcessGroup | None = None
        self._owns_group = False

    @property
    def topology(self) -> GroupTopology:
        """The division of ranks into groups.

        Raises:
            RuntimeError: before `create`.
        """
        if self._topology is None:
            raise RuntimeError("contrastive groups exist only after the strategy has set up the processes")
        return self._topology

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group that holds this rank; None for a group of one."""
        return self._group if self.topology.group_size > 1 else None

    def create(self, *, ranks_per_node: int, timeout: timedelta | None) -> None:
        """Make the groups; collective over all ranks, which make all groups in the same order (NCCL needs that).

        Raises:
            UserError: if the ranks cannot be grouped as requested.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        group_size = resolve_group_size(
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            group_size=self._group_size,
            group_nodes=self._group_nodes,
        )
        self.destroy()
        topology = GroupTopology(world_size, group_size)
        if group_size == world_size:
            self._group = dist.group.WORLD
        elif group_size > 1:
            groups = [dist.new_group(list(members), timeout=timeout) for members in topology.groups()]
            own = groups[topology.group_index(rank)]
            assert isinstance(own, dist.ProcessGroup), f"rank {rank} is not in its own group"
            self._group, self._owns_group = own, True
        self._topology = topology

    def destroy(self) -> None:
        """Free the group of this rank."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._topology, self._group, self._owns_group = None, None, False


class GroupedStrategy(ParallelStrategy):
    """Base of strategies for many ranks, where rows of the ranks of one group are negatives of each other.

    Args:
        group_size: consecutive ranks per group; it divides the world and respects nodes. None: see `group_nodes`.
        group_nodes: whole nodes per group. With both None the world is one group: ordinary ITC.
        micro_batches: number of pieces in which a rank's rows are encoded, with one loss over all of them.
        recompute: encode a micro-batch again in backward instead of keeping its activations.
        activation_checkpointing: keep only the input of every layer, and run the layer again in backward.
        **kwargs: what Lightning's strategy takes.
    """

    _timeout: timedelta | None  # of Lightning's strategies

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
        """Ranks whose rows are negatives of this rank's; None for a group of one."""
        return self._groups.group

    @property
    def topology(self) -> GroupTopology:
        """The division of ranks into groups."""
        return self._groups.topology

    def setup_environment(self) -> None:
        """Start the processes, then group them.

        Raises:
            UserError: if the ranks cannot be grouped as requested.
        """
        super().setup_environment()
        assert self.parallel_devices is not None, "Lightning sets them"
        self._groups.create(ranks_per_node=len(self.parallel_devices), timeout=self._timeout)

    def parallelize(self, model: M2Encoder) -> None:
        """Prepare a freshly built model; the training module calls this in `configure_model`."""
        if self.activation_checkpointing:
            checkpoint_layers(model)

    def teardown(self) -> None:
        """Free the groups, then what Lightning made."""
        self._groups.destroy()
        super().teardown()
