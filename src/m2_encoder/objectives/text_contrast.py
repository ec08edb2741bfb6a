"""Contrast within texts: captions of one image, in two languages or two wordings, against captions of other images.

    loss_a = mean over p in P_a of  log(1 + sum_{n in N_a} exp((y_a . y_n - y_a . y_p) / t))

P_a: the other captions of the image that caption a describes. N_a: captions of the group that describe other content,
without those that resemble a more than `max_similarity` (more likely the same meaning than a mistake); of what is left,
the `hard_negatives` most similar ones, or all. The loss is the mean over all captions.

Letters: n local images · k captions per image, at least 2 · M images of the group · g ranks · E feature dim.

Cost per rank and step: sent 2 (g - 1) k n E elements, half of them in backward; with a tile of rows at a time no
(k n x k M) matrix exists. Backward makes every tile again.

Reference: the purpose is that of FG-CLIP 2's textual intra-modal contrastive loss (arXiv:2510.10921), to tell similar
captions apart; its exact formula and numbers were not at hand, so filter, choice and form here are this project's.
InfoNCE: arXiv:1807.03748.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional

from m2_encoder.bounds import Count, NotNegative, Positive, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.row_tiles import GroupRows, gather_group, map_rows
from m2_encoder.objectives.schedule import Schedule


class TextContrast(Objective):
    """Contrast of captions over the ranks of the contrastive group, which must hold equally many rows.

    It needs two captions per image or more (`data.captions.every_language=true`), and trains the text side alone: use
    it beside an objective that trains images.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        temperature: t, constant: the model's own belongs to images and texts.
        hard_negatives: how many of the most similar negatives count; None for all.
        max_similarity: cosine above which a caption of other content is left out; 1.0 leaves none out.

    Raises:
        UserError: for numbers that make no sense.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        temperature: Positive = 0.07,
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
            rows = gather_group(inputs, images=False)
            if rows.captions < 2:
                raise UserError(
                    "text_contrast compares the captions of an image, but there is one each; "
                    "use data.captions.every_language=true"
                )
            count = rows.local * rows.captions
            losses = map_rows(
                lambda some: self._losses(rows, some), count, len(rows.texts), element_size=rows.texts.element_size()
            )
            # Nothing, but a gradient for what only images pass: DDP waits for all of them.
            nothing = (inputs.image_features.sum() + inputs.logit_scale) * 0
        return ObjectiveOutput(loss=losses.mean() + nothing, per_sample=losses.detach())

    def _losses(self, rows: GroupRows, some: slice) -> Tensor:
        captions = rows.captions
        own = torch.arange(rows.own_texts.start, rows.own_texts.stop, device=rows.texts.device)[some]
        similarities = rows.texts[own] @ rows.texts.t()
        positives = torch.stack([own // captions * captions + other for other in range(captions)], dim=1)
        left_out = rows.identity[own // captions, None] == rows.text_identity
        if self._max_similarity < 1:
            left_out |= similarities.detach() > self._max_similarity
        logits = similarities / self._temperature
        negatives = logits.masked_fill(left_out, -torch.inf)
        if self._hard_negatives is not None:
            negatives = negatives.topk(min(self._hard_negatives, negatives.shape[1]), dim=1).values
        has_negatives = negatives.detach().amax(dim=1, keepdim=True) > -torch.inf
        # Rows without negatives: a loss of 0, and no NaN on the way back.
        bound = negatives.masked_fill(~has_negatives, 0.0).logsumexp(dim=1, keepdim=True)
        losses = torch.where(has_negatives, functional.softplus(bound - logits.gather(1, positives)), 0.0)
        return losses.masked_fill(positives == own[:, None], 0.0).sum(dim=1) / (captions - 1)
