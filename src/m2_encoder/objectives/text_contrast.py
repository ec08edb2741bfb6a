"""Contrast within texts: captions of one image, in two languages or two wordings, against captions of other images.

    loss_a = mean over p in P_a of  log(1 + sum_{n in N_a} exp((y_a . y_n - y_a . y_p) / t))

P_a: the other captions of the image that caption a describes. N_a: captions of the group that describe other content,
without those more similar to a than `max_similarity` (which probably mean the same); of these, the `hard_negatives`
most similar ones, or all. The loss is the mean over all captions.

Letters: n local images · k captions per image, at least 2 · M images of the group · g ranks · E feature dim.

Cost per rank and step: sent 2 (g - 1) k n E elements, half of them in backward. Similarities exist for a tile of rows
at a time, never as a (k n x k M) matrix; backward computes every tile again.

Reference: FG-CLIP 2's textual intra-modal contrastive loss (arXiv:2510.10921) has the same purpose, to tell similar
captions apart; the formula and the filter are this project's own. InfoNCE: arXiv:1807.03748.
"""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from m2_encoder.bounds import Count, NotNegative, Temperature, check_bounds
from m2_encoder.distributed.collectives import gather_constant, gather_rows
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.schedule import Schedule

_TILE_BYTES: Final = 16 << 20
"""Size of one matrix of a tile; a tile needs a few."""


class TextContrast(Objective):
    """Contrast of captions over the ranks of the contrastive group, which must hold equally many rows.

    It needs at least two captions per image (`data.captions.every_language=true`) and trains only the text side: use
    it beside an objective that trains images.

    Args:
        temperature: t, constant: the model's own belongs to images and texts.
        hard_negatives: how many of the most similar negatives count; None for all.
        max_similarity: cosine above which a caption of other content is left out; 1.0 leaves none out.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        temperature: Temperature = 0.07,
        hard_negatives: Count | None = None,
        max_similarity: Annotated[float, Gt(-1), Le(1)] = 0.95,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self._temperature = temperature
        self._hard_negatives = hard_negatives
        self._max_similarity = max_similarity

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local captions against all captions of the group.

        Raises:
            UserError: if images have one caption each.
        """
        with torch.autocast(inputs.text_features.device.type, enabled=False):
            captions = len(inputs.text_features) // len(inputs.image_features)
            if captions < 2:
                raise UserError(
                    "text_contrast compares the captions of an image, but there is one each; "
                    "use data.captions.every_language=true"
                )
            texts = inputs.text_features.to(torch.promote_types(inputs.text_features.dtype, torch.float32))
            first, count = 0, len(texts)
            if inputs.group is not None:
                first = dist.get_rank(inputs.group) * count
                texts = gather_rows(texts, inputs.group)
            rows = _GroupTexts(texts, gather_constant(inputs.identity, inputs.group), captions)
            size = max(1, _TILE_BYTES // (texts.element_size() * len(texts)))
            tiles = torch.arange(first, first + count, device=texts.device).split(size)
            losses = torch.cat(
                [checkpoint(self._losses, rows, own, use_reentrant=False, preserve_rng_state=False) for own in tiles]
            )
            # Zero times what only images pass: DDP hangs if a parameter gets no gradient.
            nothing = (inputs.image_features.sum() + inputs.logit_scale) * 0
        return ObjectiveOutput(loss=losses.mean() + nothing, per_sample=losses.detach())

    def _losses(self, rows: _GroupTexts, own: Tensor) -> Tensor:
        """Losses of some captions, given by their rows in the group, (t,) int64."""
        captions = rows.captions
        similarities = rows.texts[own] @ rows.texts.t()
        positives = torch.stack([own // captions * captions + other for other in range(captions)], dim=1)
        left_out = rows.identity[own // captions, None] == rows.identity.repeat_interleave(captions)
        if self._max_similarity < 1:
            left_out |= similarities.detach() > self._max_similarity
        logits = similarities / self._temperature
        negatives = logits.masked_fill(left_out, -torch.inf)
        if self._hard_negatives is not None:
            negatives = negatives.topk(min(self._hard_negatives, negatives.shape[1]), dim=1).values
        has_negatives = negatives.detach().amax(dim=1, keepdim=True) > -torch.inf
        # Rows without negatives have a loss of 0, and no NaN in backward.
        bound = negatives.masked_fill(~has_negatives, 0.0).logsumexp(dim=1, keepdim=True)
        losses = torch.where(has_negatives, functional.softplus(bound - logits.gather(1, positives)), 0.0)
        return losses.masked_fill(positives == own[:, None], 0.0).sum(dim=1) / (captions - 1)


class _GroupTexts(NamedTuple):
    """Captions of all ranks of the group."""

    texts: Tensor  # (k * M, E), differentiable, fp32 at least
    identity: Tensor  # of the images, (M,) int64
    captions: int  # k; text j describes image j // k
