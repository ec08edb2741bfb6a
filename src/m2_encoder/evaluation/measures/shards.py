"""Ranks over a gallery whose parts lie on several ranks: each compares its own part once, and counts are added.

All ranks get the numbers that one rank with the whole gallery gets.

Letters: W ranks · n images in all · n_r of this rank · m texts · P pairs · E feature dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.evaluation.measures.ranks import CHUNK_SIZE, Comparison, Ranks


def rank_shards(
    texts: Tensor,
    own_images: Tensor,
    own_rows: Tensor,
    pairs: Tensor,
    back_pairs: Tensor | None = None,
    *,
    num_images: int,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Ranks, Ranks]:
    """Ranks of images for each text, and of texts for each image, as `ranks.rank_both_ways` of all images.

    Args:
        texts: of all ranks, (m, E), the same on each.
        own_images: of this rank, (n_r, E), on a device that the group's backend takes; may be empty.
        own_rows: which of all images they are, (n_r,) int64; each image lies on one rank.
        pairs: rows of a text and of an image among all, (P, 2) int64, the same on each rank.
        back_pairs: rows of an image among all and of a text, (P', 2); by default `pairs` the other way round.
        num_images: n.
        group: None for all ranks.
        chunk_size: as in `ranks.rank_queries`.
    """
    device = own_images.device
    places = torch.full((num_images,), -1, dtype=torch.long, device=device)
    places[own_rows.to(device)] = torch.arange(len(own_images), device=device)
    own, back = pairs.to(device), (pairs.flip(1) if back_pairs is None else back_pairs).to(device)
    own, back = torch.stack([own[:, 0], places[own[:, 1]]], dim=1), torch.stack([places[back[:, 0]], back[:, 1]], dim=1)
    comparison = Comparison(texts, own_images, own[own[:, 1] >= 0], back[back[:, 0] >= 0], chunk_size=chunk_size)
    text_side, image_side = comparison.rows, comparison.columns
    dist.all_reduce(text_side.best, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(image_side.largest, op=dist.ReduceOp.MAX, group=group)
    comparison.count()
    dist.all_reduce(text_side.ahead, group=group)
    dist.all_reduce(text_side.ties, group=group)
    mine = image_side.ranks(len(texts))
    every = torch.zeros(2, num_images, dtype=torch.long, device=device)
    every[:, own_rows.to(device)] = torch.stack([mine.ranks, mine.ties]).to(device)
    dist.all_reduce(every, group=group)
    ranks, ties = every.cpu()
    return text_side.ranks(num_images), Ranks(ranks, ties, len(texts))
