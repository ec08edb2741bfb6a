"""SigLIP: a binary classification of every image with every text of the contrastive group.

    z_ij = s x_i . y_j + b,   s = exp(logit_scale),   b: a parameter of this objective
    loss = 1/(kM) sum_j sum_i  log(1 + exp(-t_ij z_ij)),    t_ij = 1 if text j describes image i, else -1

Letters: n local images · k captions per image · M images of the group · g ranks of the group · E feature dim.

With k = 1 this is SigLIP's loss. Nothing is normalised over a row, so losses and gradients of a tile of logits are
final as soon as it exists: forward computes both, one tile of (local texts x all images) at a time. Images are
gathered, and their gradients are summed back to their ranks in forward. Backward only multiplies by the upstream
gradient.

Cost per rank and step: sent 2 (g - 1) n E elements, k times fewer than if texts were gathered; 3 matrix products of
k n x M x E; memory 2 M E + (k + 1) n E + one tile. SigLIP's own ring of neighbours sends the same bytes in g messages,
and holds M = n.

Reference: SigLIP (arXiv:2303.15343), Eq. 1 and section 3.3, also for the initial s and b.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.distributed as dist
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.distributed.averaging import expect_averages
from m2_encoder.distributed.collectives import gather_constant, scatter_sums
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.derivatives import check_log_scales, refuse_forward_mode, refuse_second_derivative
from m2_encoder.objectives.schedule import Schedule

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


class SigmoidContrastive(Objective):
    """SigLIP over the ranks of the strategy's contrastive group, which must hold equally many rows.

    The scale is the model's `logit_scale`. SigLIP starts from s = 10: `model.initial_temperature=0.1`; a trained model
    keeps its own.

    Args:
        initial_bias: b at the start; below 0, since nearly all pairs are wrong.
        multi_positive: rows with the same identity describe each other; otherwise only an image and its own captions.
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
        return sigmoid_losses(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            self.logit_bias,
            group=inputs.group,
            identity=inputs.identity if self.multi_positive else None,
        )


def sigmoid_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
) -> ObjectiveOutput:
    """SigLIP of features, fp32 (fp64 for fp64 features).

    Args:
        image_features: L2-normalised, (n, E).
        text_features: L2-normalised, (k * n, E); row j describes image j // k.
        logit_scale: log of s, ().
        logit_bias: b, ().
        group: ranks whose images are compared with, n on each; None for this rank alone.
        identity: equal numbers mark images with the same content, (n,) int64; None: only own captions match.

    Returns:
        The gradient, averaged over all ranks, is that of the mean of all ranks' losses. Every rank of the group must
        weigh its loss equally: the gradients of others' images are exchanged before backward.

    Raises:
        UserError: for shapes that do not fit, a scale that was exponentiated already or is not finite, derivatives in
            forward mode or of second order; from `backward` as `image_text_contrastive`.
    """
    images, texts = tuple(image_features.shape), tuple(text_features.shape)
    if len(images) != 2 or not images[0] or len(texts) != 2 or texts[0] % images[0] or texts[1] != images[1]:
        raise UserError(f"image_features {images} and text_features {texts} must be (n, E) and (k * n, E), n above 0")
    refuse_forward_mode("sigmoid_losses", image_features, text_features, logit_scale, logit_bias)
    check_log_scales(logit_scale)
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
    expect_averages(loss, [image_features, text_features, logit_scale])
    return ObjectiveOutput(loss=loss, per_sample=rows)


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
        all_images, classes, all_classes = _gather(images, identity, group)
        classes, scale = classes.repeat_interleave(len(texts) // len(images)), log_scale.exp()
        losses = texts.new_zeros(len(texts))
        wants_gradients = any(ctx.needs_input_grad)
        of_texts, of_images, of_bias = (torch.zeros_like(side) for side in (texts, all_images, bias))
        for start in range(0, len(texts), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            for first in range(0, len(all_images), _TILE_COLUMNS):
                columns = slice(first, first + _TILE_COLUMNS)
                logits = (texts[rows] @ all_images[columns].t()).mul_(scale).add_(bias)
                matches = classes[rows, None] == all_classes[columns]
                signed = torch.where(matches, -logits, logits)  # of the wrong answer
                losses[rows] += functional.softplus(signed).sum(dim=1)
                if wants_gradients:  # still without the factors s and 1 / (k n)
                    slope = signed.sigmoid_()
                    slope = torch.where(matches, -slope, slope)
                    of_texts[rows].addmm_(slope, all_images[columns])
                    of_images[columns].addmm_(slope.t(), texts[rows])
                    of_bias += slope.sum()
        if wants_gradients:
            for total in (of_texts, of_images):
                total *= scale / len(texts)
            of_bias /= len(texts)
            # d/ds of sum_ij d_ij s x_i . y_j, times s.
            of_log_scale = (of_texts * texts).sum()
            if group is not None:
                of_images = scatter_sums(of_images, group)
            ctx.save_for_backward(of_images, of_texts, of_log_scale, of_bias)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("sigmoid_losses")
        return (*(part * upstream[0] for part in ctx.saved_tensors), None, None)


def _gather(images: Tensor, identity: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the group, and classes of the local ones and of all: identities, or numbers of rows."""
    all_images = gather_constant(images, group)
    if identity is not None:
        return all_images, identity, gather_constant(identity, group)
    numbers = torch.arange(len(all_images), device=images.device)
    first = 0 if group is None else dist.get_rank(group) * len(images)
    return all_images, numbers[first : first + len(images)], numbers
