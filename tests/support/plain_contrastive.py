"""ITC as its formula says it: the whole logit matrix of a group in one process, explicit targets, torch's own autograd.

Knows nothing of the package. Rows of a group are given rank by rank, because a rank's loss is the mean over its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_losses(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    *,
    identity: Sequence[Tensor] | None = None,
    smoothing: float = 0.0,
) -> list[Tensor]:
    """The loss of each rank of one group; features per rank, (n_r, E) and (c * n_r, E), text j describing image j // c.

    A rank's loss is the mean over its images of the cross-entropy with its targets among all texts of the group, plus
    the mean over its texts of that among all images, halved.
    """
    all_images, all_texts = torch.cat(list(images)), torch.cat(list(texts))
    captions = len(all_texts) // len(all_images)
    names = torch.arange(len(all_images)) if identity is None else torch.cat(list(identity))
    same = names[:, None] == names.repeat_interleave(captions)[None, :]
    logits = logit_scale.exp() * all_images @ all_texts.t()
    image_rows = _cross_entropy(logits, same, smoothing)
    text_rows = _cross_entropy(logits.t(), same.t(), smoothing)
    counts = [len(part) for part in images]
    by_image = image_rows.split(counts)
    by_text = text_rows.split([captions * count for count in counts])
    return [(one.mean() + other.mean()) / 2 for one, other in zip(by_image, by_text, strict=True)]


def world_loss(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    *,
    group_size: int,
    identity: Sequence[Tensor] | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The mean over all ranks of their losses, where `group_size` neighbours share their rows."""
    losses: list[Tensor] = []
    for start in range(0, len(images), group_size):
        part = slice(start, start + group_size)
        names = None if identity is None else identity[part]
        losses += rank_losses(images[part], texts[part], logit_scale, identity=names, smoothing=smoothing)
    return torch.stack(losses).mean()


def _cross_entropy(logits: Tensor, same: Tensor, smoothing: float) -> Tensor:
    shares = same.to(logits.dtype)
    targets = (1 - smoothing) * shares / shares.sum(dim=1, keepdim=True) + smoothing / logits.shape[1]
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1)
