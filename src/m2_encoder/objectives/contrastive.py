"""Image-text contrastive learning (ITC). Letters in shapes are explained in `m2_encoder.types`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from m2_encoder.distributed.collectives import gather_rows, gather_rows_without_grad
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput


def image_text_contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
    captions_per_image: int = 1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric InfoNCE over the contrastive group.

    Args:
        image_features: L2-normalised, (B, E).
        text_features: L2-normalised, (k * B, E) with k `captions_per_image`; row j describes image j // k.
        logit_scale: log of the inverse temperature, ().
        group: ranks whose features serve as negatives, the same B on each; None for this rank alone.
        identity: equal numbers mark images with the same content, (B,) int64; they and all their captions are positives
            of each other, with equal shares. None: only an image and its own captions match.
        captions_per_image: k.
        label_smoothing: share of the target spread evenly over all rows of the group, in [0, 1).

    Returns:
        Mean loss over the local rows (the mean over images of image-to-text and the mean over texts of text-to-image,
        halved), (), fp32 (fp64 for fp64 features). Its gradient, averaged over the ranks of the
        group as DDP does, is that of the mean loss over all rows of the group.

    Raises:
        UserError: if shapes differ or are not (B, E), if there are no rows, or for a smoothing outside [0, 1).

    Reference: CLIP (arXiv:2103.00020), Fig. 3; several positives: UniCL (arXiv:2204.03610), Eq. 3-5.
    """
    return contrastive_row_losses(
        image_features,
        text_features,
        logit_scale,
        group=group,
        identity=identity,
        captions_per_image=captions_per_image,
        label_smoothing=label_smoothing,
    ).mean()


def contrastive_row_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
    captions_per_image: int = 1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each local text, half its image's and half its own, (k * B,); see `image_text_contrastive`."""
    _check(image_features, text_features, identity, captions_per_image, label_smoothing)
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    # Mixed precision would multiply even fp32 features in half precision: at scale 100 logits would be off by tenths.
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = image_features.to(dtype), text_features.to(dtype)
        all_images, all_texts = (
            (images, texts) if group is None else (gather_rows(images, group), gather_rows(texts, group))
        )
        scale = logit_scale.to(dtype).exp()
        to_texts, to_images = _targets(images, group=group, identity=identity, captions_per_image=captions_per_image)
        image_to_text = functional.cross_entropy(
            scale * images @ all_texts.t(), to_texts, label_smoothing=label_smoothing, reduction="none"
        )
        text_to_image = functional.cross_entropy(
            scale * texts @ all_images.t(), to_images, label_smoothing=label_smoothing, reduction="none"
        )
    return (image_to_text.repeat_interleave(captions_per_image) + text_to_image) / 2


class ImageTextContrastive(Objective):
    """ITC over the features of the vision-language encoder and the ranks of the strategy's contrastive group.

    Args:
        weight: factor in the sum of objectives.
        label_smoothing: share of the target spread evenly over all rows, in [0, 1).
        multi_positive: treat rows with the same identity (the same picture or concept drawn twice) as positives of
            each other instead of as false negatives.
    """

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0, multi_positive: bool = True) -> None:
        super().__init__(weight=weight)
        _check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        self.multi_positive = multi_positive

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows against all rows of the group."""
        losses = contrastive_row_losses(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            group=inputs.group,
            identity=inputs.identity if self.multi_positive else None,
            captions_per_image=inputs.text_features.shape[0] // max(1, inputs.image_features.shape[0]),
            label_smoothing=self.label_smoothing,
        )
        return ObjectiveOutput(loss=losses.mean(), per_sample=losses.detach())


def _check(
    image_features: Tensor, text_features: Tensor, identity: Tensor | None, captions_per_image: int, smoothing: float
) -> None:
    images, texts = tuple(image_features.shape), tuple(text_features.shape)
    if len(images) != 2 or texts != (images[0] * captions_per_image, images[1]):
        raise UserError(
            f"image_features {images} and text_features {texts} must be (B, E) and (k * B, E), "
            f"text j describing image j // k, with k = captions_per_image = {captions_per_image}"
        )
    if not image_features.shape[0]:
        raise UserError(f"features {tuple(image_features.shape)} have no rows; a mean needs at least one")
    if identity is not None and identity.shape != image_features.shape[:1]:
        raise UserError(f"identity has shape {tuple(identity.shape)}, expected ({image_features.shape[0]},)")
    _check_smoothing(smoothing)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing={label_smoothing!r} must be in [0, 1)")


def _targets(
    images: Tensor, *, group: dist.ProcessGroup | None, identity: Tensor | None, captions_per_image: int
) -> tuple[Tensor, Tensor]:
    """Targets over all texts for the local images, and over all images for the local texts.

    Returns:
        Columns of the only positives, twice (B,) int64; or shares of the columns, (B, G * k * B) and (k * B, G * B).
    """
    rows = images.shape[0]
    offset = 0 if group is None else dist.get_rank(group) * rows
    own = torch.arange(offset, offset + rows, device=images.device)
    if identity is None and captions_per_image == 1:
        return own, own
    identity = own if identity is None else identity
    identities = identity if group is None else gather_rows_without_grad(identity, group)
    to_texts = _shares(identity, identities.repeat_interleave(captions_per_image), images.dtype)
    to_images = _shares(identity.repeat_interleave(captions_per_image), identities, images.dtype)
    return to_texts, to_images


def _shares(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    same = (rows[:, None] == columns[None, :]).to(dtype)
    return same / same.sum(dim=1, keepdim=True)
