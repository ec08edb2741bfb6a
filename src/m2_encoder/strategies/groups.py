"""Base of strategies for many ranks: contrastive process groups, and batch accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from m2_encoder.bounds import Count, Seconds, check_bounds
from m2_encoder.distributed.groups import open_groups
from m2_encoder.distributed.rank_watch import GOES_ON, RankWatch, describe_exit, is_stopped_process
from m2_encoder.distributed.topology import GroupTopology, resolve_group_size
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.models.two_towers import Encoder
from m2_encoder.strategies.meeting import STARTER_VARIABLE, QuietLauncher, end_process, find_place, meet, open_store
from m2_encoder.strategies.micro_batches import check_micro_batches

_START_S: Final = 60.0  # that a process of this machine may take to import everything


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
        world_size = dist.get_world_size()
        group_size = resolve_group_size(
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            group_size=self._group_size,
            group_nodes=self._group_nodes,
        )
        self.destroy()
        topology = GroupTopology(world_size, group_size)
        if group_size > 1:
            self._group = open_groups(topology, timeout=timeout)
            self._owns_group = group_size < world_size
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
        micro_batches: number of pieces in which a rank's rows are encoded, with one loss over all of them; above 1 only
            for a module that reads it here and says so, by `reads_micro_batches`.
        recompute: encode a micro-batch again in backward instead of keeping its activations.
        activation_checkpointing: keep only the input of every layer, and run the layer again in backward.
        rank_timeout_s: a rank that gives no sign of life for so long, stopped or dead, ends the run on all ranks.
        start_timeout_s: the same for one that has not come yet, where torchrun or a cluster starts the ranks.
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
        rank_timeout_s: Seconds = 120.0,
        start_timeout_s: Seconds = 600.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rank_timeout_s = rank_timeout_s
        self.start_timeout_s = start_timeout_s
        self._watch: RankWatch | None = None
        self._stage = self._resumed = ""  # what is done, and after it; "" at the start
        self._has_failed = self._is_kept = False
        self._started: dict[int, subprocess.Popen[Any]] = {}  # by this process, by their ranks
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

    def connect(self, model: lightning.LightningModule) -> None:
        """Take the module, before anything is started.

        Raises:
            UserError: if it would ignore `micro_batches`.
        """
        check_micro_batches(self.micro_batches, model)
        super().connect(model)

    def setup_environment(self) -> None:
        """Let the processes meet and watch each other, then group them.

        Raises:
            UserError: if the ranks cannot meet, or be grouped as requested.
        """
        if not dist.is_initialized():
            self._meet()
        super().setup_environment()
        assert self.parallel_devices is not None, "Lightning sets them"
        self._groups.create(ranks_per_node=len(self.parallel_devices), timeout=self._timeout)

    def parallelize(self, model: Encoder) -> None:
        """Prepare a freshly built model; the training module calls this in `configure_model`."""
        if self.activation_checkpointing:
            checkpoint_layers(model)

    def on_train_start(self) -> None:
        """From now on there are steps."""
        super().on_train_start()
        self._stage = "step"

    def on_validation_start(self) -> None:
        """From now on batches are validated."""
        super().on_validation_start()
        self._resumed, self._stage = self._stage, "validation, after step"

    def on_validation_end(self) -> None:
        """Go on with what was done before."""
        super().on_validation_end()
        self._stage = self._resumed

    def on_train_end(self) -> None:
        """From now on there are none."""
        super().on_train_end()
        self._stage = "the end, after step"

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While inside, all ranks save, which takes long for a large model on a slow disk."""
        before, self._stage = self._stage, "saving, after step"
        yield
        self._stage = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the ranks go on watching each other after the training, such as while weights are gathered."""
        self._is_kept = True
        try:
            yield
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self._is_kept = False
            self._leave()

    def explain_loss(self) -> str | None:
        """Which rank must have ended, now that a connection is closed, how and when; None if that does not show."""
        return None if self._watch is None else self._watch.explain_loss()

    def end_without_first(self) -> None:
        """End this process, whose first rank has ended; say so where that was in the middle of the run."""
        if self._watch is not None:
            text = f"at {self._where()}: rank 0, which had started this one, has ended. {GOES_ON}"
            end_process(text, [], speaks=self.local_rank <= 1)

    def on_exception(self, exception: BaseException) -> None:
        """Do not say that this rank leaves as it should."""
        self._has_failed = True
        super().on_exception(exception)

    def teardown(self) -> None:
        """Free the groups, then what Lightning made; the first rank waits for the others to get there."""
        if not self._is_kept:
            self._leave()
        self._groups.destroy()
        super().teardown()

    def _leave(self) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if self._has_failed:
            watch.stop()
            return
        for text in watch.leave(wait=self.is_global_zero):
            print(f"m2-train: {text}", file=sys.stderr, flush=True)
        for process in self._started.values():
            if is_stopped_process(process.pid):
                process.kill()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            own = self._launcher
            self._launcher = QuietLauncher(own.cluster_environment, own.num_processes, own.num_nodes)

    def _meet(self) -> None:
        """Make the process group, as Lightning does, through a store that the watch uses, too."""
        assert self.accelerator is not None, "Lightning sets it"
        assert self.cluster_environment is not None, "Lightning sets it"
        self.set_world_ranks()  # type: ignore[attr-defined]
        self.accelerator.setup_device(self.root_device)
        rank, place = self.global_rank, find_place(self.cluster_environment)
        processes = getattr(self.launcher, "procs", [])
        self._started = {rank + number: process for number, process in enumerate(processes, start=1)}
        started = [process.pid for process in processes]
        # Where a launcher has started the ranks, the first one may still look at data, and machines come one by one.
        is_prompt = (
            bool(started) or (rank == 0 and getattr(self, "num_nodes", 1) == 1) or STARTER_VARIABLE in os.environ
        )
        prompt_s = min(_START_S, self.start_timeout_s)
        arrive_s = max(self.rank_timeout_s, prompt_s if is_prompt else self.start_timeout_s)
        store = open_store(
            place, rank=rank, world_size=self.world_size, timeout_s=arrive_s, stopped_s=self.rank_timeout_s
        )
        self._watch = RankWatch(
            place,
            rank=rank,
            world_size=self.world_size,
            timeout_s=self.rank_timeout_s,
            arrive_s=arrive_s,
            where=self._where,
            is_stopped=lambda other: other in self._started and is_stopped_process(self._started[other].pid),
            find_end=self._find_end,
            end=lambda text: end_process(text, started, speaks=self.local_rank <= 1),
        )
        self._watch.start()
        backend = self._get_process_group_backend()  # type: ignore[attr-defined]
        meet(store, self.root_device, backend, rank=rank, world_size=self.world_size, timeout=self._timeout)

    def _find_end(self, other: int) -> str | None:
        return describe_exit(self._started[other].poll()) if other in self._started else None

    def _where(self) -> str:
        """What this rank is doing; asked by another thread."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        if trainer is None or not self._stage:
            return "the start"
        return f"{self._stage} {trainer.global_step + (self._stage == 'step')}"
