"""FSDP2 whose contrastive loss looks at a group of the ranks: GBA-ITC with weights that are split over all ranks."""

from __future__ import annotations

from datetime import timedelta

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.distributed.gradients import average_over_ranks
from m2_encoder.distributed.topology import GroupTopology
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers, shard_model
from m2_encoder.strategies.groups import ContrastiveGroups


class GroupedFSDPStrategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state split over all ranks; rows of a group's ranks are negatives of each other.

    A checkpoint is one file with whole tensors, as of every other strategy, so a run may go on under another one.

    Args:
        group_size: consecutive ranks per group; it divides the world and respects nodes. None: see `group_nodes`.
        group_nodes: whole nodes per group. With both None the world is one group: ordinary ITC.
        micro_batches: k: a rank's rows are encoded in so many pieces, with one loss over all of them.
        recompute: encode a micro-batch again in backward instead of keeping its activations.
        activation_checkpointing: keep only the input of every layer, and run the layer again in backward.
        reshard_after_forward: free a layer's gathered weights between forward and backward.
        process_group_backend: as in Lightning's `ModelParallelStrategy`.
        timeout: of a collective.

    Raises:
        UserError: for both ways of naming a group's size, or an impossible k.

    Reference: FSDP (arXiv:2304.11277), in its second form, `torch.distributed.fsdp.fully_shard`.
    """

    @check_bounds
    def __init__(
        self,
        group_size: Count | None = None,
        group_nodes: Count | None = None,
        micro_batches: Count = 1,
        recompute: bool = True,
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._groups = ContrastiveGroups(group_size=group_size, group_nodes=group_nodes)
        self._averaging: list[RemovableHandle] = []
        self.micro_batches = micro_batches
        self.recompute = recompute
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward

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
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()
        self._groups.create(ranks_per_node=self.num_processes, timeout=self._timeout)

    def parallelize(self, model: M2Encoder) -> None:
        """Checkpoint and shard a freshly built model; the training module calls this in `configure_model`."""
        if self.activation_checkpointing:
            checkpoint_layers(model)
        # On the CPU autocast leaves layer norms alone, which then take weights of their input's dtype only.
        mixed = self.precision_plugin.precision == "bf16-mixed" and self.root_device.type != "cpu"
        shard_model(
            model,
            mesh=self.device_mesh["data_parallel"],
            reshard_after_forward=self.reshard_after_forward,
            layer_dtype=torch.bfloat16 if mixed else None,
        )

    def setup(self, trainer: lightning.Trainer) -> None:
        """Set up as Lightning does, and treat what is not split as DDP does: equal at the start, averaged gradients."""
        super().setup(trainer)
        assert self.lightning_module is not None
        whole = [p for p in self.lightning_module.parameters() if not isinstance(p, DTensor)]
        for parameter in whole:
            dist.broadcast(parameter.data, src=0)
        self._averaging = average_over_ranks([p for p in whole if p.requires_grad], None)

    def teardown(self) -> None:
        """Undo the averaging, free the groups, then what Lightning made. The weights stay split."""
        while self._averaging:
            self._averaging.pop().remove()
        self._groups.destroy()
        super().teardown()
