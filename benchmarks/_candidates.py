"""What `grouped_training.py` compares: losses, the encoder they train, and one optimizer step.

Every candidate sees the same rows per rank and step, the same model, DDP's gradient mean over all ranks and AdamW. k is
the number of pieces a rank encodes its rows in: with k > 1 only one piece keeps its activations, and each is encoded
twice. The baselines encode all their rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder import M2Encoder
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.objectives import encode_pieces, image_text_contrastive
from m2_encoder.types import TextTokens

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Image features (B, E), text features (B, E) and logit_scale () to the rank's loss ()."""


class Candidate(NamedTuple):
    """One way to train.

    Attributes:
        label: for tables.
        method: "full" (all logits on every rank), "local" (own rows against all, open_clip's gather), "local_fused"
            (the same with one gather on tensor collectives) or "grouped" (ours).
        group_size: g, ranks whose rows are negatives of each other.
        micro_batches: k.
    """

    label: str
    method: str
    group_size: int
    micro_batches: int


def list_candidates(world_size: int) -> list[Candidate]:
    """Baselines first, then ours for every g that divides the world, with k = 1 and 4."""
    baselines = [
        Candidate("full logits, open_clip", "full", world_size, 1),
        Candidate("local loss, open_clip", "local", world_size, 1),
        Candidate("local loss, fused gather", "local_fused", world_size, 1),
    ]
    sizes = [size for size in range(world_size, 0, -1) if world_size % size == 0]
    ours = [Candidate(f"ours g={g} k={k}", "grouped", g, k) for k, g in itertools.product((1, 4), sizes)]
    return baselines + ours


def new_groups(world_size: int) -> dict[int, dist.ProcessGroup | None]:
    """This rank's group of every size that divides the world; every rank must call it. None for a group of one."""
    own: dict[int, dist.ProcessGroup | None] = {1: None, world_size: dist.group.WORLD}
    for size in range(2, world_size):
        if world_size % size == 0:
            for first in range(0, world_size, size):
                group = dist.new_group(range(first, first + size))
                if first <= dist.get_rank() < first + size:
                    own[size] = group
    return own


def build_loss(candidate: Candidate, groups: dict[int, dist.ProcessGroup | None]) -> Loss:
    """The loss of a candidate on this rank."""
    group = groups[candidate.group_size]
    if candidate.method == "grouped":
        return partial(image_text_contrastive, group=group, equal_rows=True)  # as in training
    if candidate.method == "local_fused":
        return _local_loss_fused
    from open_clip.loss import ClipLoss  # takes seconds to import, and only ranks need it

    loss = ClipLoss(
        local_loss=candidate.method == "local",
        gather_with_grad=True,
        cache_labels=True,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    return lambda images, texts, scale: loss(images, texts, scale.exp())


class _GatherWithGrad(torch.autograd.Function):
    """All ranks' rows; the gradient of the own rows is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        own = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def _local_loss_fused(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Local loss as good as it gets with a gather that has a gradient: one collective forward, one backward."""
    all_images, all_texts = _GatherWithGrad.apply(torch.cat([images, texts], dim=1)).chunk(2, dim=1)
    target = torch.arange(len(images)) + dist.get_rank() * len(images)
    logits = (logit_scale.exp() * images @ all_texts.t(), logit_scale.exp() * texts @ all_images.t())
    return sum(nn.functional.cross_entropy(each, target) for each in logits) / 2  # type: ignore[return-value]


class PairEncoder(nn.Module):
    """The tiny M2-Encoder for pairs, in pieces.

    Attributes:
        model: with the parts frozen that a contrastive loss does not train, as in training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = M2Encoder(NAME_TO_CONFIG["tiny"])
        self.model.freeze_parts(OPTIONAL_PARTS)

    def forward(self, images: Tensor, text: TextTokens, micro_batches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features of all rows, (B, E) twice, and logit_scale, (); with k > 1, pieces are encoded again in backward."""
        pieces = list(zip(*(part.chunk(micro_batches) for part in (images, *text)), strict=True))
        image_features, text_features = encode_pieces(self._encode, pieces, recompute=True)
        return image_features, text_features, self.model.logit_scale

    def _encode(self, piece: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, ids, mask = piece
        return self.model.encode_image(images), self.model.encode_text(TextTokens(ids, mask))
