"""FSDP2 with contrastive groups: GBA-ITC with weights sharded over all ranks."""

from __future__ import annotations

from datetime import timedelta

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from m2_encoder.bounds import Count, Seconds, check_bounds
from m2_encoder.distributed.gradients import average_over_ranks
from m2_encoder.models.parallelize import shard_model
from m2_encoder.models.two_towers import Encoder
from m2_encoder.strategies.groups import GroupedStrategy


class GroupedFSDPStrategy(GroupedStrategy, ModelParallelStrategy):
    """FSDP2: weights, gradients and optimizer state are sharded over all ranks; more arguments as in `GroupedStrategy`.

    A checkpoint is one file with whole tensors, as of every other strategy, so that a run can resume under another one.

    Args:
        reshard_after_forward: free a layer's gathered weights between forward and backward.
        process_group_backend: as in Lightning's `ModelParallelStrategy`.
        timeout: of a collective.

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
        rank_timeout_s: Seconds = 120.0,
        start_timeout_s: Seconds = 600.0,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            group_size=group_size,
            group_nodes=group_nodes,
            micro_batches=micro_batches,
            recompute=recompute,
            activation_checkpointing=activation_checkpointing,
            rank_timeout_s=rank_timeout_s,
            start_timeout_s=start_timeout_s,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward
        self._averaging: list[RemovableHandle] = []

    def setup_environment(self) -> None:
        """Start the processes, then group them."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    def parallelize(self, model: Encoder) -> None:
        """Checkpoint and shard a freshly built model; the training module calls this in `configure_model`."""
        super().parallelize(model)
        # On the CPU, autocast does not apply to layer norms, which need weights of their input's dtype.
        mixed = self.precision_plugin.precision == "bf16-mixed" and self.root_device.type != "cpu"
        shard_model(
            model,
            mesh=self.device_mesh["data_parallel"],
            reshard_after_forward=self.reshard_after_forward,
            layer_dtype=torch.bfloat16 if mixed else None,
        )

    def setup(self, trainer: lightning.Trainer) -> None:
        """Set up; parameters that are not sharded are broadcast, and their gradients averaged, as DDP does."""
        super().setup(trainer)
        assert self.lightning_module is not None
        whole = [p for p in self.lightning_module.parameters() if not isinstance(p, DTensor)]
        for parameter in whole:
            dist.broadcast(parameter.data, src=0)
        self._averaging = average_over_ranks([p for p in whole if p.requires_grad], None)

    def teardown(self) -> None:
        """Undo the averaging and free the groups. The weights stay sharded."""
        while self._averaging:
            self._averaging.pop().remove()
        super().teardown()
