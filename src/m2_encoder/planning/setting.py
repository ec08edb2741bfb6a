"""The setting of a training step: ranks, groups and micro-batches.

Letters: W world size · g ranks in a contrastive group · B rows of a rank in one micro-batch · k micro-batches of an
optimizer step · M rows that are contrasted with each other.
"""

from __future__ import annotations

import dataclasses

from m2_encoder.distributed.topology import group_sizes
from m2_encoder.errors import UserError
from m2_encoder.planning.hardware import Hardware

PLANNED_METHODS = ("local_form", "local_loss", "full_logits")
"""The methods of `communication.METHODS` whose time and memory are predicted."""
STRATEGIES = ("grouped_ddp", "grouped_fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to make an optimizer step.

    Attributes:
        world_size: W.
        group_size: g; the whole world for methods that know no groups.
        rows: B.
        micro_batches: k. Methods other than `local_form` compute a loss of its own for each.
        method: one of `PLANNED_METHODS`.
        strategy: `grouped_ddp` keeps everything on every rank, `grouped_fsdp` a share of 1/W.
        recompute: encode every micro-batch again in backward, so that one alone keeps its activations; nothing for
            k = 1 or another method, where one alone is alive anyway.
        activation_checkpointing: keep the inputs of layers alone and compute the rest again.
        feature_bytes: of a feature element on the wire.

    Raises:
        UserError: for numbers below 1, unknown words, or a group that does not divide the world.
    """

    world_size: int
    group_size: int
    rows: int
    micro_batches: int = 1
    method: str = "local_form"
    strategy: str = "grouped_ddp"
    recompute: bool = True
    activation_checkpointing: bool = False
    feature_bytes: int = 4

    def __post_init__(self) -> None:
        for name in ("world_size", "group_size", "rows", "micro_batches", "feature_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        for name, known in (("method", PLANNED_METHODS), ("strategy", STRATEGIES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)} must be one of {', '.join(known)}")
        if self.world_size % self.group_size:
            raise UserError(f"group_size={self.group_size} must divide world_size={self.world_size}")
        if self.method != "local_form" and self.group_size != self.world_size:
            raise UserError(f"method={self.method} knows no groups: group_size must be {self.world_size}")

    @property
    def local_rows(self) -> int:
        """Rows of a rank in an optimizer step, k · B."""
        return self.micro_batches * self.rows

    @property
    def global_rows(self) -> int:
        """Rows of an optimizer step, W · k · B."""
        return self.world_size * self.local_rows

    @property
    def contrasted_rows(self) -> int:
        """M: rows that a row is contrasted with, itself included."""
        return self.group_size * (self.local_rows if self.method == "local_form" else self.rows)

    @property
    def encodes_again(self) -> bool:
        """Whether backward encodes whole micro-batches again."""
        return self.method == "local_form" and self.recompute and self.micro_batches > 1

    @property
    def micro_batches_alive(self) -> int:
        """How many micro-batches keep their activations at a time."""
        return self.micro_batches if self.method == "local_form" and not self.encodes_again else 1


def group_sizes_of(world_size: int, hardware: Hardware) -> list[int]:
    """Sizes of contiguous, node-aligned groups that divide the world; the whole world is always one of them."""
    per_node = min(world_size, hardware.devices_per_node)
    return sorted({*group_sizes(world_size=world_size, ranks_per_node=per_node), world_size})
