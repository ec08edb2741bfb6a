"""Image-text contrastive learning with softened targets: rows that resemble each other are not wholly wrong.

    loss = 1/2 [mean_i H(T_i, softmax_j S_ij) + mean_j H(U_j, softmax_i S_ij)],    S_ij = s x_i . y_j,  H: cross-entropy
    T_i = (1 - a) P_i + a Q_i,    P_i: equal shares on the positives of image i

What Q_i, which is held constant, says of row i:

    "image"    softmax over images m of x_i . x_m / t, each image's share spread evenly over its captions
    "text"     the same with the similarities of captions, averaged over the captions of both images
    "both"     the mean of the two
    "uniform"  the same share for every row

U mirrors T. a may grow with the steps ("progressively"). With a = 0 this is ITC with several positives.

Letters: n local images · k captions per image · M images of the group · g ranks of the group · E feature dim.

Cost per rank and step: sent 2 (g - 1)(k + 1) n E elements, half of them in backward; with a tile of rows at a time no
(n x k M) matrix exists. Backward makes every tile again.

Reference: SoftCLIP (arXiv:2303.17561) for targets from similarities within a modality; LightCLIP (arXiv:2312.00674) for
softening the labels of negatives progressively, of which "uniform" with growing a is our reading; UniCL
(arXiv:2204.03610) for several positives. Targets of a teacher stand in `distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import (
    Objective,
    ObjectiveInputs,
    ObjectiveOutput,
    check_schedule,
    interpolate_schedule,
)
from m2_encoder.objectives.row_tiles import GroupRows, gather_group, map_rows

SOURCES: Final = ("image", "text", "both", "uniform")
"""Where softened targets come from."""

Targets: TypeAlias = Callable[[slice], Tensor]
"""Shares of all columns for some local rows, (t, columns)."""


class SoftTargetContrastive(Objective):
    """ITC over the ranks of the contrastive group, which must hold equally many rows, against softened targets.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        softness: a, in [0, 1); or by step, {step: a}, linear in between.
        source: of Q, one of `SOURCES`.
        temperature: t, of the similarities within a modality.
        multi_positive: rows with the same identity are positives of each other; otherwise only own captions.

    Raises:
        UserError: for a softness outside [0, 1), an unknown source, or a temperature that is not above 0.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        schedule: Mapping[int, float] | None = None,
        softness: float | Mapping[int, float] = 0.2,
        source: Literal["image", "text", "both", "uniform"] = "both",
        temperature: float = 0.07,
        multi_positive: bool = True,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        if source not in SOURCES:
            raise UserError(f"source={source!r} must be one of {', '.join(SOURCES)}")
        if not temperature > 0:
            raise UserError(f"temperature={temperature!r} must be above 0")
        self._softness = check_softness(softness)
        self._source = source
        self._temperature = temperature
        self._multi_positive = multi_positive

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows against all rows of the group."""
        with torch.autocast(inputs.image_features.device.type, enabled=False):
            rows = gather_group(inputs)
            if not self._multi_positive:
                rows = rows._replace(identity=torch.arange(len(rows.images), device=rows.identity.device))
            softness = interpolate_schedule(self._softness, inputs.step)
            targets = _Targets(rows, softness=softness, source=self._source, temperature=self._temperature)
            scale = inputs.logit_scale.to(rows.images.dtype).exp()
            by_image, by_text = cross_entropies(rows, scale, targets.of_images, targets.of_texts)
        per_sample = (by_image.repeat_interleave(rows.captions) + by_text).detach() / 2
        return ObjectiveOutput(loss=(by_image.mean() + by_text.mean()) / 2, per_sample=per_sample)


def check_softness(softness: Any) -> dict[int, float]:
    """Softness by step.

    Raises:
        UserError: for a value outside [0, 1), or a schedule that makes no sense.
    """
    points = softness if isinstance(softness, Mapping) else {0: softness}
    values = list(points.values())
    if not values or not all(isinstance(a, int | float) and not isinstance(a, bool) and 0 <= a < 1 for a in values):
        raise UserError(f"softness={softness!r} must be in [0, 1), or such numbers by step, {{0: 0, 10000: 0.3}}")
    return check_schedule(points) if any(values) else {0: 0.0}


def cross_entropies(
    rows: GroupRows, scale: Tensor, image_targets: Targets, text_targets: Targets
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of targets with the softmax of image-text logits over the group.

    Args:
        rows: of the group.
        scale: s, ().
        image_targets: shares of all texts for some of the local images, rows that sum to 1; without a gradient.
        text_targets: shares of all images for some of the local texts, likewise.

    Returns:
        Of the local images, (n,), and of the local texts, (k * n,).
    """

    def losses(queries: Tensor, keys: Tensor, targets: Targets) -> Tensor:
        def of_some(some: slice) -> Tensor:
            logits = scale * (queries[some] @ keys.t())
            return logits.logsumexp(dim=1) - (targets(some) * logits).sum(dim=1)

        return map_rows(of_some, len(queries), len(keys), element_size=keys.element_size())

    return (
        losses(rows.images[rows.own_images], rows.texts, image_targets),
        losses(rows.texts[rows.own_texts], rows.images, text_targets),
    )


class _Targets:
    """T and U, a tile of local rows at a time."""

    def __init__(self, rows: GroupRows, *, softness: float, source: str, temperature: float) -> None:
        self._rows, self._softness, self._source = rows, softness, source
        self._images = rows.images.detach() / temperature**0.5
        # The similarity of two sets of captions, averaged over all pairs, is that of their means.
        means = rows.texts.detach().unflatten(0, (-1, rows.captions)).mean(dim=1)
        self._texts = means / temperature**0.5

    @torch.no_grad()
    def of_images(self, some: slice) -> Tensor:
        """Shares of all texts for some local images, (t, k * M)."""
        rows = torch.arange(self._rows.local, device=self._images.device)[some]
        captions = self._rows.captions
        return (self._shares(rows) / captions).repeat_interleave(captions, dim=1)

    @torch.no_grad()
    def of_texts(self, some: slice) -> Tensor:
        """Shares of all images for some local texts, (t, M)."""
        texts = torch.arange(self._rows.local * self._rows.captions, device=self._images.device)[some]
        return self._shares(texts // self._rows.captions)

    def _shares(self, own: Tensor) -> Tensor:
        """Shares of all images for some local images, (t, M)."""
        rows = own + self._rows.first
        same = (self._rows.identity[rows, None] == self._rows.identity).to(self._images.dtype)
        hard = same / same.sum(dim=1, keepdim=True)
        if not self._softness:
            return hard
        return (1 - self._softness) * hard + self._softness * self._soft(rows)

    def _soft(self, rows: Tensor) -> Tensor:
        if self._source == "uniform":
            return torch.full_like(self._images[:1, :1], 1 / len(self._images))
        image, text = ((side[rows] @ side.t()).softmax(dim=1) for side in (self._images, self._texts))
        return {"image": image, "text": text, "both": (image + text) / 2}[self._source]
