"""Image-text contrastive learning (ITC) over grouped ranks. Letters in shapes are explained in `m2_encoder.types`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Ge, Lt
from torch import Tensor

from m2_encoder.bounds import NotNegative, Rule, check_bounds
from m2_encoder.distributed.averaging import expect_averages
from m2_encoder.distributed.collectives import exchange_counts
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive_one_sided import one_sided_forward
from m2_encoder.objectives.contrastive_op import NO_GROUP, contrastive_forward
from m2_encoder.objectives.derivatives import refuse_forward_mode
from m2_encoder.objectives.schedule import Schedule

HEADS: Final = ("features", "backbone_features")
"""Heads of the model: on the vision-language encoder, and on the backbone."""

_HEADS_RULE: Final = Rule(
    lambda heads: "features" in heads and len(set(heads)) == len(heads) and set(heads) <= set(HEADS),
    f"[features] or [{', '.join(HEADS)}]",
    "[features]",
)

_NORM_TOLERANCE: Final = 0.02  # bf16 rounds a norm by up to 0.004


def image_text_contrastive(
    image_features: Tensor | Sequence[Tensor],
    text_features: Tensor | Sequence[Tensor],
    logit_scale: Tensor | Sequence[Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
    captions_per_image: int = 1,
    label_smoothing: float = 0.0,
    equal_rows: bool = False,
    one_sided: bool = False,
    debug: bool = False,
) -> Tensor:
    """Symmetric InfoNCE over the contrastive group: GBA-ITC of M2-Encoder.

    Features and logsumexps are gathered once, and backward sends nothing. Logits exist one tile at a time, never as a
    (B, G * B) matrix. Features may have any floating dtype; all sums are in fp32 (fp64 for fp64).

    Args:
        image_features: L2-normalised, (B, E); or one such tensor per head.
        text_features: L2-normalised, (k * B, E) with k `captions_per_image`; row j describes image j // k. As many.
        logit_scale: log of the inverse temperature, (). As many.
        group: ranks whose features serve as negatives; None for this rank alone. All its ranks call this together.
        identity: equal numbers mark images with the same content, (B,) int64; they and all their captions are positives
            of each other, with equal shares. None: only an image and its own captions match. On all ranks or none.
        captions_per_image: k, the same on all ranks.
        label_smoothing: share of the target spread evenly over all rows of the group, in [0, 1).
        equal_rows: promise that all ranks of the group have the same B; else they tell each other first, in 0.5 ms.
        one_sided: gather the texts alone and let backward send: four matrix products instead of six, faster where
            arithmetic is slower than the network (`contrastive_one_sided`). Needs `equal_rows`.
        debug: refuse features that are not normalised (costs a synchronisation), and ranks that break `equal_rows`
            (undefined behaviour otherwise). Always on with torch's anomaly detection (`trainer.detect_anomaly=true`).

    Returns:
        Mean of the image-to-text loss of local images and the text-to-image loss of local texts, and over the heads,
        (), fp32 (fp64 for fp64 features). Its gradient, averaged over all ranks as DDP and FSDP do, is that of the mean
        of all ranks' losses, `logit_scale` included.

    Raises:
        UserError: for shapes, dtypes or devices that do not fit, no rows, a smoothing outside [0, 1), a group that does
            not hold this rank, a `logit_scale` that is an exponential (above log(20,000)) or not finite, derivatives in
            forward mode, or (in debug) features that are not normalised and rows that are not equal; from `backward`,
            if DistributedDataParallel does not average the gradients behind it (`distributed.averaging`).

    Reference: M2-Encoder (arXiv:2401.15896), grouped aggregation (the formulas are derived here, see
        `contrastive_op`); CLIP (arXiv:2103.00020), Fig. 3; several positives: UniCL (arXiv:2204.03610), Eq. 3-5.
    """
    losses, _ = contrastive_losses(
        image_features,
        text_features,
        logit_scale,
        group=group,
        identity=identity,
        captions_per_image=captions_per_image,
        label_smoothing=label_smoothing,
        equal_rows=equal_rows,
        one_sided=one_sided,
        debug=debug,
    )
    return losses.mean()


class ContrastiveLosses(NamedTuple):
    """Losses of H heads."""

    loss: Tensor  # mean over the local rows, (H,), differentiable
    per_sample: Tensor  # loss of each local text, half its image's and half its own, (k * B, H), detached


def contrastive_losses(
    image_features: Tensor | Sequence[Tensor],
    text_features: Tensor | Sequence[Tensor],
    logit_scale: Tensor | Sequence[Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    identity: Tensor | None = None,
    captions_per_image: int = 1,
    label_smoothing: float = 0.0,
    equal_rows: bool = False,
    one_sided: bool = False,
    debug: bool = False,
) -> ContrastiveLosses:
    """The losses of every head, and of every local text; arguments and errors as in `image_text_contrastive`."""
    images, texts, scales = (
        _as_heads(name, given)
        for name, given in (
            ("image_features", image_features),
            ("text_features", text_features),
            ("logit_scale", logit_scale),
        )
    )
    _check_heads(images, texts, scales)
    for pair in zip(images, texts, strict=True):
        _check_features(*pair, captions_per_image)
    _check_options(images[0], identity, label_smoothing)
    refuse_forward_mode("image_text_contrastive", *images, *texts, *scales)
    group_name = _group_name(group)
    if debug or (not torch.compiler.is_compiling() and torch.is_anomaly_enabled()):
        for name, features in (("image_features", images), ("text_features", texts)):
            _check_norms(name, features)
        if equal_rows and group is not None:
            _check_equal_rows(images[0].shape[0], group)
    if one_sided and not equal_rows:
        raise UserError("one_sided=True needs equal_rows=True: its reduce-scatter takes as many rows from every rank")
    wire = torch.promote_types(images[0].dtype, texts[0].dtype)
    sums = torch.promote_types(wire, torch.float32)
    stacked = _stack(images, dim=1).to(wire), _stack(texts, dim=1).to(wire)
    scales_of_heads = _stack([scale.reshape(()) for scale in scales], dim=0).to(sums)
    if one_sided and group_name != NO_GROUP:
        loss, rows, *_ = one_sided_forward(*stacked, scales_of_heads, identity, group_name, label_smoothing)
    else:
        loss, rows, *_ = contrastive_forward(
            *stacked, scales_of_heads, identity, group_name, equal_rows, label_smoothing
        )
    expect_averages(loss, [*images, *texts, *scales])
    return ContrastiveLosses(loss, rows.detach())


class ImageTextContrastive(Objective):
    """ITC over the ranks of the strategy's contrastive group.

    Args:
        label_smoothing: share of the target spread evenly over all rows, in [0, 1).
        multi_positive: treat rows with the same identity (the same picture or concept drawn twice) as positives of
            each other instead of as false negatives.
        heads: which of `HEADS` are trained; the loss is their mean. "features" is required, since without it the
            vision-language encoder would get no gradient.
        equal_rows: all ranks have the same number of rows in every step; the data modules of this project see to it.
        one_sided: see `image_text_contrastive`.
        feature_dtype: "bfloat16" or "float16" rounds features before they are gathered and multiplied: half the
            traffic, and bf16 products on GPUs. null leaves them as they are: fp32 even in mixed precision.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
        multi_positive: bool = True,
        heads: Annotated[Sequence[Literal["features", "backbone_features"]], _HEADS_RULE] = ("features",),
        equal_rows: bool = True,
        one_sided: bool = False,
        feature_dtype: Literal["bfloat16", "float16"] | None = None,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        if one_sided and not equal_rows:
            raise UserError(
                "must be false where ranks may differ in rows (equal_rows=false)", key="one_sided", value=True
            )
        self.feature_dtype = None if feature_dtype is None else getattr(torch, feature_dtype)
        self.label_smoothing = label_smoothing
        self.multi_positive = multi_positive
        self.heads = tuple(heads)
        self.equal_rows, self.one_sided = equal_rows, one_sided
        self.optional_parts = frozenset(heads) - {"features"}

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows against all rows of the group."""
        pairs = [inputs.heads[name] for name in self.heads]
        losses, per_sample = contrastive_losses(
            [pair.image_features.to(self.feature_dtype or pair.image_features.dtype) for pair in pairs],
            [pair.text_features.to(self.feature_dtype or pair.text_features.dtype) for pair in pairs],
            [pair.logit_scale for pair in pairs],
            group=inputs.group,
            identity=inputs.identity if self.multi_positive else None,
            captions_per_image=inputs.text_features.shape[0] // max(1, inputs.image_features.shape[0]),
            label_smoothing=self.label_smoothing,
            equal_rows=self.equal_rows,
            one_sided=self.one_sided,
        )
        return ObjectiveOutput(loss=losses.mean(), per_sample=per_sample.mean(dim=1))


def _as_heads(name: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    verb, wrong = "is", [given]
    if isinstance(given, list | tuple):
        verb, wrong = "holds", [part for part in given if not isinstance(part, Tensor)]
    if wrong:
        kind = type(wrong[0]).__name__
        raise UserError(f"{name} {verb} a {kind}; it must be a tensor, or several in a list, one per head")
    return list(given)


def _stack(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0].unsqueeze(dim) if len(parts) == 1 else torch.stack(parts, dim=dim)


def _group_name(group: dist.ProcessGroup | None) -> str:
    if group is None:
        return NO_GROUP
    if not isinstance(group, dist.ProcessGroup):
        raise UserError(
            f"group={group!r} does not hold this rank; every rank must pass the group that new_group made with it"
        )
    if dist.get_rank(group) < 0:
        raise UserError(
            f"group {group.group_name} does not hold this rank ({dist.get_rank()} of {dist.get_world_size()}); "
            "every rank must pass the group that it is a member of"
        )
    return str(group.group_name)


def _check_heads(images: list[Tensor], texts: list[Tensor], scales: list[Tensor]) -> None:
    if not images or not len(images) == len(texts) == len(scales):
        raise UserError(
            f"{len(images)} image_features, {len(texts)} text_features and {len(scales)} logit_scale: "
            "must be as many of each, one per head"
        )
    for name, tensors in (("image_features", images), ("text_features", texts)):
        for other in tensors[1:]:
            if (other.shape, other.dtype, other.device) != (tensors[0].shape, tensors[0].dtype, tensors[0].device):
                raise UserError(
                    f"{name} of the heads are {tuple(tensors[0].shape)} {tensors[0].dtype} and {tuple(other.shape)} "
                    f"{other.dtype}; heads that are gathered together must agree"
                )
    for scale in scales:
        if scale.numel() != 1 or not scale.is_floating_point() or scale.device != images[0].device:
            raise UserError(
                f"logit_scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; it must be one floating number "
                f"on {images[0].device}, the log of the inverse temperature"
            )


def _check_features(images: Tensor, texts: Tensor, captions_per_image: int) -> None:
    shapes = tuple(images.shape), tuple(texts.shape)
    if len(shapes[0]) != 2 or captions_per_image < 1 or shapes[1] != (shapes[0][0] * captions_per_image, shapes[0][1]):
        raise UserError(
            f"image_features {shapes[0]} and text_features {shapes[1]} must be (B, E) and (k * B, E), "
            f"text j describing image j // k, with k = captions_per_image = {captions_per_image}"
        )
    if not images.shape[0]:
        raise UserError(f"features {shapes[0]} have no rows; a mean needs at least one")
    if any(not side.is_floating_point() or side.element_size() < 2 for side in (images, texts)):
        raise UserError(
            f"features are {images.dtype} and {texts.dtype}; they must be floating numbers of 16 bits or more"
        )
    if images.device != texts.device:
        raise UserError(f"image_features are on {images.device}, text_features on {texts.device}; move one of them")


def _check_options(images: Tensor, identity: Tensor | None, smoothing: float) -> None:
    if identity is not None and (identity.shape != images.shape[:1] or identity.dtype != torch.int64):
        raise UserError(
            f"identity is {identity.dtype} {tuple(identity.shape)}, expected torch.int64 ({images.shape[0]},)"
        )
    if identity is not None and identity.device != images.device:
        raise UserError(f"identity is on {identity.device}, the features on {images.device}; move one of them")
    if not 0 <= smoothing < 1:
        raise UserError(f"label_smoothing={smoothing!r} must be in [0, 1)")


def _check_equal_rows(rows: int, group: dist.ProcessGroup) -> None:
    counts = exchange_counts(rows, group)
    if len(set(counts)) > 1:
        raise UserError(f"equal_rows=True, but the ranks of the group have {counts} rows; use equal_rows=False")


def _check_norms(name: str, heads: list[Tensor]) -> None:
    for features in heads:
        norms = features.detach().float().norm(dim=1)
        off = (norms - 1).abs()
        worst = int(off.argmax())
        if off[worst] > _NORM_TOLERANCE:  # NaN is another mistake, which training counts and skips
            raise UserError(
                f"{name} must be L2-normalised, row {worst} has norm {norms[worst]:.4g}; "
                f"use torch.nn.functional.normalize({name}, dim=-1)"
            )
