"""Image-text contrastive learning with soft targets: similar rows count as partly right.

    loss = 1/2 [mean_i H(T_i, softmax_j S_ij) + mean_j H(U_j, softmax_i S_ij)],    S_ij = s x_i . y_j,  H: cross-entropy
    T_i = (1 - a) P_i + a Q_i,    P_i: equal shares on the positives of image i

Q_i, by `source`, without a gradient:

    "image"    softmax over images m of x_i . x_m / t, each image's share spread evenly over its captions
    "text"     the same with the similarities of captions, averaged over the captions of both images
    "both"     the mean of the two
    "uniform"  the same share for every row

U mirrors T. a may grow with the steps. With a = 0 this is ITC with several positives.

Letters: n local images · k captions per image · M images of the group · g ranks of the group · E feature dim.

Cost per rank and step: ITC's, and for the soft part sent 4 (g - 1) n E elements more, 6 to 8 matrix products of
n x M x E, and memory 4 M E with a few tiles: no (n x M) matrix exists. Backward sends nothing.

Reference: SoftCLIP (arXiv:2303.17561) for targets from similarities within a modality; LightCLIP (arXiv:2312.00674) for
softening the labels of negatives progressively, of which "uniform" with growing a is our reading; UniCL
(arXiv:2204.03610) for several positives. `distillation` has targets of a teacher.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.bounds import Fraction, NotNegative, Temperature, check_bounds
from m2_encoder.distributed.collectives import gather_constant
from m2_encoder.errors import UserError
from m2_encoder.objectives.alignment import mean_alignment
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive import contrastive_losses
from m2_encoder.objectives.schedule import Schedule, check_points, interpolate_schedule


class SoftTargetContrastive(Objective):
    """ITC over the ranks of the contrastive group, which must hold equally many rows, against softened targets.

    Args:
        softness: a, in [0, 1); or by step, [[step, a], ...], linear in between.
        source: of Q: "image", "text", "both" or "uniform".
        temperature: t, of the similarities within a modality.
        multi_positive: rows with the same identity are positives of each other; otherwise only own captions.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        softness: Fraction | Schedule = 0.2,
        source: Literal["image", "text", "both", "uniform"] = "both",
        temperature: Temperature = 0.07,
        multi_positive: bool = True,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self._softness = _check_softness(softness)
        self._source = source
        self._temperature = temperature
        self._multi_positive = multi_positive

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows against all rows of the group."""
        images, texts, group = inputs.image_features, inputs.text_features, inputs.group
        captions = len(texts) // max(1, len(images))
        hard = contrastive_losses(
            images,
            texts,
            inputs.logit_scale,
            group=group,
            identity=inputs.identity if self._multi_positive else None,
            captions_per_image=captions,
            equal_rows=True,
        )
        loss, per_sample = hard.loss.mean(), hard.per_sample.squeeze(1)
        softness = interpolate_schedule(self._softness, inputs.step)
        if not softness:
            return ObjectiveOutput(loss=loss, per_sample=per_sample)
        with torch.autocast(images.device.type, enabled=False):
            images, texts = images.to(loss.dtype), texts.to(loss.dtype)
            # An image's target is spread evenly over its captions, so that only their mean counts.
            means = texts.unflatten(0, (-1, captions)).mean(dim=1)
            shares = _Shares(images, means, inputs, source=self._source, temperature=self._temperature)
            if not self._multi_positive:
                shares.identity = torch.arange(len(shares.images), device=images.device)
            by_image = mean_alignment(images, means, shares.texts, shares, group=group)
            by_text = mean_alignment(means, images, shares.images, shares, group=group)
            factor = softness * inputs.logit_scale.to(loss.dtype).exp() / 2
            loss = loss + factor * (by_image.mean + by_text.mean)
            own = (images * by_image.mixed).sum(dim=1).repeat_interleave(captions)
            own = own + (texts * by_text.mixed.repeat_interleave(captions, dim=0)).sum(dim=1)
        return ObjectiveOutput(loss=loss, per_sample=per_sample + (factor * own).detach())


def _check_softness(softness: Any) -> dict[int, float]:
    points = {0: float(softness)} if _is_share(softness) else check_points(softness, key="softness")
    if not all(_is_share(a) for a in points.values()):
        raise UserError(
            "must be in [0, 1), or such numbers by step, [[0,0],[10000,0.3]]", key="softness", value=softness
        )
    return points


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


class _Shares:
    """P - Q of some local images over all images of the group, (t, M).

    Args:
        images: local, (n, E).
        texts: means of their captions, (n, E); the similarity of two means is the mean over all pairs of captions.
        inputs: for identities and the group.
        source: of Q.
        temperature: t.
    """

    def __init__(
        self, images: Tensor, texts: Tensor, inputs: ObjectiveInputs, *, source: str, temperature: float
    ) -> None:
        self.images, self.texts = gather_constant(images, inputs.group), gather_constant(texts, inputs.group)
        self.identity = gather_constant(inputs.identity, inputs.group)
        self._first = 0 if inputs.group is None else dist.get_rank(inputs.group) * len(images)
        self._temperature = temperature
        sides = {"image": [self.images], "text": [self.texts], "both": [self.images, self.texts], "uniform": []}
        self._sides = sides[source]

    def __call__(self, some: slice) -> Tensor:
        rows = slice(self._first + some.start, self._first + some.stop)
        same = self.identity[rows, None] == self.identity
        shares = same / same.sum(dim=1, keepdim=True).to(self.images.dtype)
        if not self._sides:
            return shares - 1 / len(self.images)
        for side in self._sides:
            similar = torch.mm(side[rows] / self._temperature, side.t()).softmax(dim=1)
            shares.sub_(similar, alpha=1 / len(self._sides))
        return shares
