"""The contrastive loss with texts gathered alone: four matrix products where the local form needs six.

A rank computes the logits of its images against all texts, once for both softmaxes: its own row sums are complete, the
column sums of all ranks meet in an all-reduce, and the gradients of the texts go back to their ranks in a
reduce-scatter, which is the price: backward sends. For fp32 features the bytes are those of the local form; for half
precision they are half as many again, because gradients travel in fp32. It wins where arithmetic is slower than the
network, as on CPUs. All ranks hold the same number of rows. Letters as in `contrastive_op`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.distributed.collectives import gather_rows_without_grad, max_over_group, scatter_sums, sum_over_group
from m2_encoder.objectives.contrastive_op import resolve_group, row_dots
from m2_encoder.objectives.contrastive_tiles import Softmax, Tiles
from m2_encoder.objectives.derivatives import check_log_scales
from m2_encoder.objectives.positives import Positives


@torch.library.custom_op("m2_encoder::one_sided_forward", mutates_args=())
def one_sided_forward(
    images: Tensor, texts: Tensor, log_scales: Tensor, identity: Tensor | None, group: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of the local rows, and what the gradient needs; arguments as in `contrastive_forward`.

    Returns:
        Mean loss of each head, (H,), the one differentiable output; losses of the local texts, (c * n, H); texts of the
        group, (c * M, H, E); logsumexps of the local images, (n, H), and of all texts, (c * M, H); all identities,
        (M,), without rows if there are none; and on the CPU, int64: rank in the group, whether tiles are in range per
        head.
    """
    process_group = resolve_group(group)
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    rows, captions = images.shape[0], texts.shape[0] // images.shape[0]
    own, own_texts = slice(rank * rows, (rank + 1) * rows), slice(rank * len(texts), (rank + 1) * len(texts))
    with torch.autocast(images.device.type, enabled=False):
        all_texts = torch.cat(gather_rows_without_grad(texts, process_group, counts=[len(texts)] * ranks))
        all_identity = torch.empty(0, dtype=torch.int64, device=images.device)
        if identity is not None:
            all_identity = torch.cat(gather_rows_without_grad(identity, process_group, counts=[rows] * ranks))
        positives = Positives(identity, all_identity, own=own, captions=captions)
        tiles = [Tiles(log_scale.exp()) for log_scale in log_scales]
        image_lse, text_lse = _lse(images, all_texts, tiles, process_group)
        check_log_scales(log_scales)  # here, since the range of the tiles has just been read from the device
        by_image, wanted = [], []
        for head, scale in enumerate(log_scales.exp()):
            image, text = images[:, head].to(scale.dtype), all_texts[:, head]
            target = positives.mean(text, captions, scale.dtype)
            if label_smoothing:
                target = torch.lerp(target, text.mean(dim=0, dtype=scale.dtype), label_smoothing)
            by_image.append(image_lse[:, head] - scale * row_dots(image, target))
            wanted.append(scale * _wanted_of_texts(positives, image, text, ranks * rows, label_smoothing))
        # Targets of a text may be images of other ranks, which alone know their logits.
        of_texts = torch.stack(wanted, dim=1)
        if identity is not None or label_smoothing:
            sum_over_group(of_texts, process_group)
        by_text = (text_lse - of_texts)[own_texts]
        losses = (torch.stack(by_image, dim=1).repeat_interleave(captions, dim=0) + by_text) / 2
    in_range = [int(t.in_range(image_lse[:, h], text_lse[:, h])) for h, t in enumerate(tiles)]
    return losses.mean(dim=0), losses, all_texts, image_lse, text_lse, all_identity, torch.tensor([rank, *in_range])


@one_sided_forward.register_fake
def _(
    images: Tensor, texts: Tensor, log_scales: Tensor, identity: Tensor | None, group: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ranks, heads = dist.get_world_size(resolve_group(group)), images.shape[1]
    return (
        log_scales.new_empty(heads),
        log_scales.new_empty((texts.shape[0], heads)),
        texts.new_empty((ranks * texts.shape[0], *texts.shape[1:])),
        log_scales.new_empty((images.shape[0], heads)),
        log_scales.new_empty((ranks * texts.shape[0], heads)),
        torch.empty(0 if identity is None else ranks * images.shape[0], dtype=torch.int64, device=images.device),
        torch.empty(1 + heads, dtype=torch.int64),
    )


@torch.library.custom_op("m2_encoder::one_sided_backward", mutates_args=())
def one_sided_backward(
    grad: Tensor,
    images: Tensor,
    log_scales: Tensor,
    identity: Tensor | None,
    all_texts: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    all_identity: Tensor,
    layout: Tensor,
    group: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum over the group of `grad[h]` times the ranks' mean losses; one reduce-scatter.

    Returns:
        For the images, (n, H, E), for the texts, (c * n, H, E), and for the log scales, (H,), in the scales' dtype.
    """
    rank, *in_range = layout.tolist()
    process_group = resolve_group(group)
    rows, ranks = images.shape[0], dist.get_world_size(process_group)
    captions = all_texts.shape[0] // (rows * ranks)
    own = slice(rank * rows, (rank + 1) * rows)
    image_grad, text_grad = (torch.zeros(s.shape, dtype=grad.dtype, device=grad.device) for s in (images, all_texts))
    scale_grad = torch.zeros_like(log_scales)
    with torch.autocast(images.device.type, enabled=False):
        positives = Positives(identity, all_identity, own=own, captions=captions)
        for head in range(images.shape[1]):
            scale, image, text = log_scales[head].exp(), images[:, head], all_texts[:, head]
            of_image, of_text = image_grad[:, head], text_grad[:, head]
            ones = image_lse.new_ones(())
            Tiles(scale).add_products(
                image,
                text,
                query_side=Softmax(image_lse[:, head], ones.expand(rows)),
                key_side=Softmax(text_lse[:, head], (ones / captions).expand(len(text))),
                query_grad=of_image,
                key_grad=of_text,
                in_range=bool(in_range[head]),
            )
            pull, factor = positives.weighted_sum(text, captions, (ones / captions).expand(len(text)), of_image.dtype)
            of_image.add_(pull, alpha=-(1 - label_smoothing) * factor)
            positives.add_to_texts(of_text, image, alpha=-(1 - label_smoothing) * 2 / captions)
            if label_smoothing:
                share = 2 * label_smoothing / len(text)
                of_image.sub_(share * text.sum(dim=0, dtype=of_image.dtype))
                of_text.sub_(share * image.sum(dim=0, dtype=of_text.dtype))
            factors = grad[head] * scale / (2 * rows)
            of_image.mul_(factors)
            of_text.mul_(factors)
            scale_grad[head] = row_dots(image, of_image).sum(dtype=torch.float64)
        own_grad = scatter_sums(text_grad, process_group)
    return image_grad, own_grad, scale_grad


@one_sided_backward.register_fake
def _(
    grad: Tensor, images: Tensor, log_scales: Tensor, identity: Tensor | None, all_texts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ranks = dist.get_world_size(resolve_group(rest[-2]))
    return (
        torch.empty(images.shape, dtype=grad.dtype, device=grad.device),
        torch.empty((all_texts.shape[0] // ranks, *all_texts.shape[1:]), dtype=grad.dtype, device=grad.device),
        torch.empty_like(log_scales),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, _, log_scales, identity, ctx.group, ctx.label_smoothing = inputs
    ctx.has_identity = identity is not None
    ctx.save_for_backward(images, log_scales, *([identity] if ctx.has_identity else []), *output[2:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    images, log_scales, *saved = ctx.saved_tensors
    identity = saved.pop(0) if ctx.has_identity else None
    image_grad, text_grad, scale_grad = one_sided_backward(
        grad, images, log_scales, identity, *saved, ctx.group, ctx.label_smoothing
    )
    return image_grad.to(images.dtype), text_grad.to(saved[0].dtype), scale_grad, None, None, None


one_sided_forward.register_autograd(_backward, setup_context=_setup_context)


def _lse(images: Tensor, all_texts: Tensor, tiles: list[Tiles], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Logsumexps of the local images, (n, H), and of all texts, (c * M, H), one all-reduce."""
    heads = range(len(tiles))
    rows, columns = (
        torch.zeros((side.shape[0], len(tiles)), dtype=tiles[0].scale.dtype, device=side.device)
        for side in (images, all_texts)
    )
    for head in heads:
        tiles[head].exp_sums(images[:, head], all_texts[:, head], rows[:, head], columns[:, head])
    sum_over_group(columns, group)
    shifts = torch.stack([t.shift for t in tiles])
    row_lse, column_lse = shifts + rows.log(), shifts + columns.log()
    # All ranks see the same column sums, so that they agree on whether to send again.
    if not all(tiles[head].in_range(column_lse[:, head]) for head in heads):
        column_lse.fill_(-torch.inf)
        for head in heads:
            own_rows = torch.full_like(row_lse[:, head], -torch.inf)
            tiles[head].logsumexps(images[:, head], all_texts[:, head], own_rows, column_lse[:, head])
        most = max_over_group(column_lse.clone(), group)
        column_lse = most + sum_over_group((column_lse - most).exp(), group).log()
    if not all(tiles[head].in_range(row_lse[:, head]) for head in heads):
        row_lse.fill_(-torch.inf)
        for head in heads:
            tiles[head].logsumexps(images[:, head], all_texts[:, head], row_lse[:, head])
    return row_lse, column_lse


def _wanted_of_texts(
    positives: Positives, images: Tensor, texts: Tensor, num_images: int, label_smoothing: float
) -> Tensor:
    """What the local images add to each text's mean target similarity, (c * M,)."""
    means = torch.zeros((texts.shape[0], images.shape[1]), dtype=images.dtype, device=images.device)
    positives.add_to_texts(means, images, alpha=1 - label_smoothing)
    if label_smoothing:
        means += label_smoothing / num_images * images.sum(dim=0)
    return row_dots(texts, means)
