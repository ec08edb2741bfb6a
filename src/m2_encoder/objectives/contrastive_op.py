"""The symmetric contrastive loss in local form, as a torch operator: exact and tiled, with nothing sent in backward.

A rank gathers features once and logsumexps once. From these it computes the gradient of *all* losses of its group with
respect to its own rows, without a (local x group) matrix.

Letters: n local images · c captions per image · m images of the group, M · H heads · E feature dim.

The mathematics was derived for this project from the published name and configuration traces of M2-Encoder
(arXiv:2401.15896, "Grouped-ITC with Batch Accumulation"); the paper does not spell it out.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from m2_encoder.distributed.collectives import exchange_counts, gather_rows_without_grad
from m2_encoder.objectives.contrastive_tiles import Softmax, Tiles
from m2_encoder.objectives.derivatives import check_log_scales
from m2_encoder.objectives.positives import Positives

NO_GROUP: Final = ""


class _Place(NamedTuple):
    """This rank's rows among those of its group."""

    counts: list[int]
    rank: int

    @property
    def own(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def others(self, per_row: int) -> list[slice]:
        """Rows of all other ranks; `per_row` as the captions per image."""
        start, stop = self.own.start * per_row, self.own.stop * per_row
        return [part for part in (slice(0, start), slice(stop, sum(self.counts) * per_row)) if part.start < part.stop]

    def shares(self, per_row: int, like: Tensor) -> Tensor:
        """Weight of each row's loss over that of a local image's: n / (c * rows of its rank), (c * M,)."""
        per_rank = torch.tensor(
            [self.counts[self.rank] / (per_row * count) for count in self.counts], dtype=torch.float64
        )
        lengths = torch.tensor([count * per_row for count in self.counts])
        return per_rank.to(like).repeat_interleave(lengths.to(like.device), output_size=sum(self.counts) * per_row)


@torch.library.custom_op("m2_encoder::contrastive_forward", mutates_args=())
def contrastive_forward(
    images: Tensor,
    texts: Tensor,
    log_scales: Tensor,
    identity: Tensor | None,
    group: str,
    equal_rows: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of the local rows, and what the gradient needs.

    Args:
        images: (n, H, E).
        texts: (c * n, H, E), the same dtype.
        log_scales: (H,), in the dtype of all sums (fp32 or fp64).
        identity: (n,) int64 or None.
        group: name of the process group, or `NO_GROUP`.
        equal_rows: every rank of the group holds n images; otherwise the numbers are exchanged first.
        label_smoothing: share of the targets spread over all rows.

    Returns:
        Mean loss of each head, (H,), the one differentiable output; losses of the local texts, each half its image's
        and half its own, (c * n, H); images and texts of the group, (M, H, E) and (c * M, H, E), empty without a group;
        logsumexps of all images and texts, (M, H) and (c * M, H); all identities, (M,), or empty; and on the CPU,
        int64: rank in the group, whether tiles are in range for each head, images of each rank.
    """
    process_group = None if group == NO_GROUP else resolve_group(group)
    with torch.autocast(images.device.type, enabled=False):
        place = _find_place(images, process_group, equal_rows=equal_rows)
        all_images, all_texts = _gather_features(images, texts, place, process_group)
        keys = (images, texts) if process_group is None else (all_images, all_texts)
        own, captions = place.own, texts.shape[0] // images.shape[0]
        lse = [
            _local_lse(images[:, head], texts[:, head], keys[0][:, head], keys[1][:, head], log_scales[head], place)
            for head in range(images.shape[1])
        ]
        check_log_scales(log_scales)  # here, since the range of the tiles has just been read from the device
        image_lse, text_lse = (torch.stack(side, dim=1) for side in zip(*lse, strict=True))
        image_lse, text_lse, all_identity = _gather_lse(image_lse, text_lse, identity, place, process_group)
        positives = Positives(identity, all_identity, own=own, captions=captions)
        losses, in_range = [], []
        for head in range(images.shape[1]):
            scale = log_scales[head].exp()
            wanted = _mean_positive(positives, keys[0][:, head], keys[1][:, head], scale.dtype, label_smoothing)
            by_image = image_lse[own, head] - scale * row_dots(images[:, head], wanted[0])
            own_texts = slice(own.start * captions, own.stop * captions)
            by_text = text_lse[own_texts, head] - scale * row_dots(
                texts[:, head], wanted[1].repeat_interleave(captions, dim=0) if captions > 1 else wanted[1]
            )
            losses.append((by_image.repeat_interleave(captions) + by_text) / 2)
            in_range.append(int(Tiles(scale).in_range(image_lse[:, head], text_lse[:, head])))
    layout = torch.tensor([place.rank, *in_range, *place.counts])
    rows = torch.stack(losses, dim=1)
    return rows.mean(dim=0), rows, all_images, all_texts, image_lse, text_lse, all_identity, layout


@contrastive_forward.register_fake
def _(
    images: Tensor,
    texts: Tensor,
    log_scales: Tensor,
    identity: Tensor | None,
    group: str,
    equal_rows: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, captions = images.shape[1], texts.shape[0] // images.shape[0]
    ranks = 1 if group == NO_GROUP else dist.get_world_size(resolve_group(group))
    rows = images.shape[0] * ranks if equal_rows or group == NO_GROUP else torch.library.get_ctx().new_dynamic_size()
    gathered = 0 if group == NO_GROUP else rows
    return (
        log_scales.new_empty(heads),
        log_scales.new_empty((texts.shape[0], heads)),
        images.new_empty((gathered, *images.shape[1:])),
        texts.new_empty((gathered * captions, *texts.shape[1:])),
        log_scales.new_empty((rows, heads)),
        log_scales.new_empty((rows * captions, heads)),
        torch.empty(0 if identity is None else rows, dtype=torch.int64, device=images.device),
        torch.empty(1 + heads + ranks, dtype=torch.int64),
    )


@torch.library.custom_op("m2_encoder::contrastive_backward", mutates_args=())
def contrastive_backward(
    grad: Tensor,
    images: Tensor,
    texts: Tensor,
    log_scales: Tensor,
    identity: Tensor | None,
    all_images: Tensor,
    all_texts: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    all_identity: Tensor,
    layout: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum over the group of `grad[h]` times the ranks' mean losses; see `contrastive_forward`.

    Returns:
        For the images, (n, H, E), for the texts, (c * n, H, E), and for the log scales, (H,), all in the dtype of the
        scales. Each rank's scale gradient is its share: half of <gradient, features> over its own rows; their mean over
        the group is the gradient of the mean loss.
    """
    (rank, *numbers), heads = layout.tolist(), images.shape[1]
    in_range, place = numbers[:heads], _Place(numbers[heads:], rank)
    own, captions = place.own, texts.shape[0] // images.shape[0]
    alone = len(place.counts) == 1
    keys = (images, texts) if alone else (all_images, all_texts)
    image_grad, text_grad = (torch.zeros(side.shape, dtype=grad.dtype, device=grad.device) for side in (images, texts))
    scale_grad = torch.zeros_like(log_scales)
    with torch.autocast(images.device.type, enabled=False):
        positives = Positives(identity, all_identity, own=own, captions=captions)
        image_shares, text_shares = place.shares(1, grad), place.shares(captions, grad)
        for head in range(heads):
            scale = log_scales[head].exp()
            sides = (
                _Side(images[:, head], image_grad[:, head], keys[0][:, head], image_lse[:, head], image_shares, own, 1),
                _Side(
                    texts[:, head], text_grad[:, head], keys[1][:, head], text_lse[:, head], text_shares, own, captions
                ),
            )
            _add_probabilities(sides, place, Tiles(scale), in_range=bool(in_range[head]))
            _subtract_targets(sides, positives, label_smoothing)
            factor = grad[head] * scale / (2 * images.shape[0])
            for side in sides:
                side.grad.mul_(factor)
                scale_grad[head] += _dot(side.grad, side.local) / 2
    return image_grad, text_grad, scale_grad


@contrastive_backward.register_fake
def _(grad: Tensor, images: Tensor, texts: Tensor, log_scales: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(images.shape, dtype=grad.dtype, device=grad.device),
        torch.empty(texts.shape, dtype=grad.dtype, device=grad.device),
        torch.empty_like(log_scales),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, texts, log_scales, identity, _, _, ctx.label_smoothing = inputs
    ctx.has_identity = identity is not None
    ctx.save_for_backward(images, texts, log_scales, *([identity] if ctx.has_identity else []), *output[2:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    images, texts, log_scales, *saved = ctx.saved_tensors
    identity = saved.pop(0) if ctx.has_identity else None
    image_grad, text_grad, scale_grad = contrastive_backward(
        grad, images, texts, log_scales, identity, *saved, ctx.label_smoothing
    )
    return image_grad.to(images.dtype), text_grad.to(texts.dtype), scale_grad, None, None, None, None


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)


class _Side(NamedTuple):
    """One modality of one head in backward: local rows and their gradient, all rows of the group, their softmaxes."""

    local: Tensor
    grad: Tensor
    all: Tensor
    lse: Tensor
    shares: Tensor
    own: slice
    per_row: int

    def softmax(self, rows: slice) -> Softmax:
        return Softmax(self.lse[rows], self.shares[rows])

    @property
    def own_softmax(self) -> Softmax:
        return self.softmax(slice(self.own.start * self.per_row, self.own.stop * self.per_row))


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of a name: operators take no objects, and torch's own collectives find groups this way."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type,unused-ignore]
    return group


def _find_place(images: Tensor, group: dist.ProcessGroup | None, *, equal_rows: bool) -> _Place:
    rows = images.shape[0]
    if group is None:
        return _Place([rows], 0)
    ranks = dist.get_world_size(group)
    counts = [rows] * ranks if equal_rows else exchange_counts(rows, group)
    return _Place(counts, dist.get_rank(group))


def _gather_features(
    images: Tensor, texts: Tensor, place: _Place, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Images and texts of the group by one collective; empty without a group."""
    if group is None:
        return images.new_empty((0, *images.shape[1:])), texts.new_empty((0, *texts.shape[1:]))
    captions = texts.shape[0] // images.shape[0]
    lengths = [count * (1 + captions) for count in place.counts]
    blocks = gather_rows_without_grad(torch.cat([images, texts]), group, counts=lengths)
    counts = place.counts
    return (
        torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)]),
        torch.cat([block[count:] for block, count in zip(blocks, counts, strict=True)]),
    )


def _local_lse(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, log_scale: Tensor, place: _Place
) -> tuple[Tensor, Tensor]:
    """Logsumexps of the local images over all texts, (n,), and of the local texts over all images, (c * n,).

    The local block serves both with one product.
    """
    tiles = Tiles(log_scale.exp())
    captions = texts.shape[0] // images.shape[0]
    blocks = [(images, all_texts[part], 0) for part in place.others(captions)]
    blocks += [(texts, all_images[part], 1) for part in place.others(1)]
    sums = [tiles.scale.new_zeros(images.shape[0]), tiles.scale.new_zeros(texts.shape[0])]
    tiles.exp_sums(images, texts, sums[0], sums[1])
    for queries, keys, side in blocks:
        tiles.exp_sums(queries, keys, sums[side])
    lse = [tiles.shift + side.log() for side in sums]
    if tiles.in_range(*lse):
        return lse[0], lse[1]
    lse = [side.fill_(-torch.inf) for side in sums]
    tiles.logsumexps(images, texts, lse[0], lse[1])
    for queries, keys, side in blocks:
        tiles.logsumexps(queries, keys, lse[side])
    return lse[0], lse[1]


def _gather_lse(
    image_lse: Tensor, text_lse: Tensor, identity: Tensor | None, place: _Place, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexps and identities of the group by one collective: identities travel as the bits of floats."""
    if group is None:
        no_ids = torch.empty(0, dtype=torch.int64, device=image_lse.device)
        return image_lse, text_lse, no_ids if identity is None else identity.clone()
    rows, heads = image_lse.shape
    parts = [image_lse.flatten(), text_lse.flatten()]
    if identity is not None:
        parts.append(identity.contiguous().view(image_lse.dtype))
    message = torch.cat(parts)
    width = message.shape[0] // rows
    texts = heads * text_lse.shape[0] // rows
    images: list[Tensor] = []
    captions: list[Tensor] = []
    ids: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=image_lse.device)]
    for block, count in zip(
        gather_rows_without_grad(message, group, counts=[count * width for count in place.counts]),
        place.counts,
        strict=True,
    ):
        first, second, third = block.split([count * heads, count * texts, count * (width - heads - texts)])
        images.append(first.unflatten(0, (-1, heads)))
        captions.append(second.unflatten(0, (-1, heads)))
        ids.append(third.clone().view(torch.int64))  # a copy, because int64 wants its own alignment
    return torch.cat(images), torch.cat(captions), torch.cat(ids)


def _mean_positive(
    positives: Positives, images: Tensor, texts: Tensor, dtype: torch.dtype, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mean target of each local image among texts and of its texts among images, (n, E) both."""
    of_texts, of_images = positives.mean(texts, positives.captions, dtype), positives.mean(images, 1, dtype)
    if not label_smoothing:
        return of_texts, of_images
    return (
        torch.lerp(of_texts, texts.mean(dim=0, dtype=dtype), label_smoothing),
        torch.lerp(of_images, images.mean(dim=0, dtype=dtype), label_smoothing),
    )


def _add_probabilities(sides: tuple[_Side, _Side], place: _Place, tiles: Tiles, *, in_range: bool) -> None:
    image, text = sides
    tiles.add_products(
        image.local,
        text.local,
        query_side=image.own_softmax,
        key_side=text.own_softmax,
        query_grad=image.grad,
        key_grad=text.grad,
        in_range=in_range,
    )
    for side, other in ((image, text), (text, image)):
        for part in place.others(other.per_row):
            tiles.add_products(
                side.local,
                other.all[part],
                query_side=side.own_softmax,
                key_side=other.softmax(part),
                query_grad=side.grad,
                in_range=in_range,
            )


def _subtract_targets(sides: tuple[_Side, _Side], positives: Positives, label_smoothing: float) -> None:
    """Subtract what both sides' targets give, in units of a local image's share in the loss."""
    image, text = sides
    captions = text.per_row
    for side, other in ((image, text), (text, image)):
        pull, factor = positives.weighted_sum(other.all, other.per_row, other.shares, side.grad.dtype)
        if side.per_row > 1:
            pull = pull.repeat_interleave(side.per_row, dim=0)
        side.grad.add_(pull, alpha=-(1 - label_smoothing) * factor)
        if label_smoothing:
            # A row's targets spread eps over the other side's rows: eps / (c * M) or eps / M each.
            count = image.all.shape[0]
            own_share = 1 / captions if side is text else 1.0
            per_row = own_share / (count * other.per_row) + other.shares / (count * side.per_row)
            side.grad.add_(per_row @ other.all.to(side.grad.dtype), alpha=-label_smoothing)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each row with its partner, (n,), in the dtype of `right`."""
    chunks = zip(left.split(1024), right.split(1024), strict=True)  # products of all rows would be a third copy
    return torch.cat([(a.to(right.dtype) * b).sum(dim=1) for a, b in chunks])


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """<left, right>, summed in fp64: the terms of a scale's gradient cancel."""
    return row_dots(right, left).sum(dtype=torch.float64).to(left.dtype)
