"""SigLIP: every image with every text of the contrastive group is a yes-or-no question of its own.

    z_ij = s x_i . y_j + b,   s = exp(logit_scale),   b: a parameter of this objective
    loss = 1/(kM) sum_j sum_i  log(1 + exp(-t_ij z_ij)),    t_ij = 1 if text j describes image i, else -1

Letters: n local images · k captions per image · M images of the group · g ranks of the group · E feature dim.

With k = 1 this is SigLIP's mean over pairs of the sum over the batch. Nothing is normalised over a row, so losses and
gradients of a tile of logits are final as soon as it exists: one walk over the tiles of (local texts x all images)
gives both, and no matrix of (k n) x M is ever held. Images are gathered (as many rows as texts or fewer), and their
gradients are summed back to their ranks, all before backward, which only multiplies by what comes from above.

Cost per rank and step: sent 2 (g - 1) n E elements, n E for each other rank in either direction, k times fewer than
if texts travelled; 3 matrix products of k n x M x E; memory 2 M E + (k + 1) n E + one tile. SigLIP's own ring of
neighbours sends the same bytes, in g small messages, and holds M = n.

Reference: SigLIP (arXiv:2303.15343), Eq. 1 and section 3.3, also for the values that s and b start from.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.distributed.collectives import gather_rows_without_grad, scatter_sums
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.schedule import Schedule

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


class SigmoidContrastive(Objective):
    """SigLIP over the ranks of the strategy's contrastive group, which must hold equally many rows.

    The scale is the model's `logit_scale`, with which the model is evaluated. SigLIP starts from s = 10:
    `model.initial_temperature=0.1`; a trained model keeps its own.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        initial_bias: b at the start. Nearly all pairs are wrong, and -10 says so from the first step.
        multi_positive: rows with the same identity describe each other; otherwise only an image and its own captions.

    Raises:
        UserError: for a bias that is no finite number.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        initial_bias: Annotated[float, Ge(-1000), Le(1000)] = -10.0,
        multi_positive: bool = True,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.multi_positive = multi_positive
        self.logit_bias = nn.Parameter(torch.tensor(float(initial_bias)))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local texts against all images of the group."""
        losses = sigmoid_losses(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            self.logit_bias,
            group=inputs.group,
            identity=inputs.identity if self.multi_positive else None,
        )
        return ObjectiveOutput(loss=losses.loss, per_sample=losses.per_sample)


class SigmoidLosses(NamedTuple):
    """Losses of the local rows."""

    loss: Tensor  # mean over the local texts, (), differentiable
    per_sample: Tensor  # of each local text, (k * n,), detached


def sigmoid_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
) -> SigmoidLosses:
    """SigLIP of features.

    Args:
        image_features: L2-normalised, (n, E).
        text_features: L2-normalised, (k * n, E); row j describes image j // k.
        logit_scale: log of s, ().
        logit_bias: b, ().
        group: ranks whose images are compared with, n on each; None for this rank alone.
        identity: equal numbers mark images with the same content, (n,) int64; None: only own captions match.

    Returns:
        Losses, fp32 (fp64 for fp64 features). The gradient, averaged over all ranks, is that of the mean of all ranks'
        losses. Every rank of the group must weigh its loss equally: the gradients of others' images are exchanged
        before backward.

    Raises:
        UserError: for shapes that do not fit.
    """
    images, texts = tuple(image_features.shape), tuple(text_features.shape)
    if len(images) != 2 or not images[0] or len(texts) != 2 or texts[0] % images[0] or texts[1] != images[1]:
        raise UserError(f"image_features {images} and text_features {texts} must be (n, E) and (k * n, E), n above 0")
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):
        loss, rows = _SigmoidLoss.apply(
            image_features.to(dtype),
            text_features.to(dtype),
            logit_scale.to(dtype),
            logit_bias.to(dtype),
            identity,
            group,
        )
    return SigmoidLosses(loss, rows)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        identity: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        captions = texts.shape[0] // images.shape[0]
        all_images, own_classes, all_classes = _gather(images, identity, group)
        walk = _Walk(texts, all_images, log_scale.exp(), bias, own_classes.repeat_interleave(captions), all_classes)
        rows = walk.run(with_gradients=any(ctx.needs_input_grad))
        ctx.has_gradients = walk.has_gradients
        if walk.has_gradients:
            of_images = walk.of_images if group is None else scatter_sums(walk.of_images, group)
            ctx.save_for_backward(of_images, walk.of_texts, walk.of_log_scale, walk.of_bias)
        ctx.mark_non_differentiable(rows)
        return rows.mean(), rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(part * upstream[0] for part in ctx.saved_tensors), None, None)


class _Walk:
    """Over the tiles of local texts and all images: losses of the texts and, in the same walk, gradients of their mean.

    Args:
        texts: local, (k * n, E).
        images: of the group, (M, E).
        scale: s, ().
        bias: b, ().
        text_classes: what each text describes, (k * n,) int64.
        image_classes: what each image shows, (M,) int64.
    """

    def __init__(
        self, texts: Tensor, images: Tensor, scale: Tensor, bias: Tensor, text_classes: Tensor, image_classes: Tensor
    ) -> None:
        self._texts, self._images, self._scale, self._bias = texts, images, scale, bias
        self._text_classes, self._image_classes = text_classes, image_classes
        self.has_gradients = False

    def run(self, *, with_gradients: bool) -> Tensor:
        """Loss of each text, (k * n,)."""
        texts, images = self._texts, self._images
        losses = texts.new_zeros(texts.shape[0])
        self.has_gradients = with_gradients
        if with_gradients:
            self.of_texts, self.of_images = torch.zeros_like(texts), torch.zeros_like(images)
            self.of_bias = torch.zeros_like(self._bias)
        for start in range(0, texts.shape[0], _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            for first in range(0, images.shape[0], _TILE_COLUMNS):
                self._visit(rows, slice(first, first + _TILE_COLUMNS), losses)
        if with_gradients:
            for total in (self.of_texts, self.of_images):
                total *= self._scale / texts.shape[0]
            self.of_bias /= texts.shape[0]
            # The scale multiplies what the texts do: sum_ij d_ij s x_i . y_j.
            self.of_log_scale = (self.of_texts * texts).sum()
        return losses

    def _visit(self, rows: slice, columns: slice, losses: Tensor) -> None:
        """Add what a tile gives; gradients still lack the factors s and 1 / (k n)."""
        texts, images = self._texts[rows], self._images[columns]
        logits = (texts @ images.t()).mul_(self._scale).add_(self._bias)
        matches = self._text_classes[rows, None] == self._image_classes[columns]
        signed = torch.where(matches, -logits, logits)  # of the wrong answer
        losses[rows] += functional.softplus(signed).sum(dim=1)
        if not self.has_gradients:
            return
        slope = signed.sigmoid_()
        slope = torch.where(matches, -slope, slope)
        self.of_texts[rows].addmm_(slope, images)
        self.of_images[columns].addmm_(slope.t(), texts)
        self.of_bias += slope.sum()


def _gather(images: Tensor, identity: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the group, and classes of the local ones and of all: identities, or numbers of rows."""
    count = images.shape[0]
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    own = torch.arange(rank * count, (rank + 1) * count, device=images.device) if identity is None else identity
    if group is None:
        return images, own, own
    all_images = torch.cat(gather_rows_without_grad(images, group, counts=[count] * ranks))
    if identity is None:
        return all_images, own, torch.arange(ranks * count, device=images.device)
    return all_images, own, torch.cat(gather_rows_without_grad(identity, group, counts=[count] * ranks))
