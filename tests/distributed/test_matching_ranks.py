"""Wrong captions across ranks: never the caption's own words, though each rank pads to its own longest caption."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from m2_encoder.objectives.base import FeaturePair, ObjectiveInputs
from m2_encoder.objectives.matching import Matching
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.objectives import draw_inputs, make_batch, part_of
from tests.support.ranks import run_ranks

RANKS, ROWS, STEPS = 2, 8, 20

Captions = list[list[tuple[int, ...]]]


def make_rows() -> ImageTextBatch:
    """All contents differ; the second half has the captions of the first over again, but the last, longest one."""
    batch, half = make_batch(ROWS, 1), ROWS // 2
    ids, mask = batch.text.ids.clone(), batch.text.mask.clone()
    mask[:half, 6:] = False
    ids[half:], mask[half:] = ids[:half].where(mask[:half], 3), mask[:half]  # on padding stands something else
    mask[-1] = True
    return batch._replace(text=TextTokens(ids, mask), identity=torch.arange(ROWS))


def draw(rank: int, group: dist.ProcessGroup | None) -> Captions:
    """A rank's wrong captions by step."""
    ranks = 1 if group is None else RANKS
    batch, features = part_of(make_rows(), rank, ranks), draw_inputs(ROWS, 1).heads["features"]
    width = int(batch.text.mask.sum(dim=1).max())
    assert width == (6 if group is not None and rank == 0 else 9)
    batch = batch._replace(text=TextTokens(*(part[:, :width] for part in batch.text)))
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    pair = FeaturePair(features.image_features[rows], features.text_features[rows], features.logit_scale)
    found = []
    for step in range(STEPS):
        wrong = Matching().select(ObjectiveInputs({"features": pair}, batch.identity, group, batch, step))
        assert wrong.has_text.all()
        found.append([tuple(ids[mask].tolist()) for ids, mask in zip(*wrong.text, strict=True)])
    return found


def work(rank: int) -> Captions:
    return draw(rank, dist.group.WORLD)


def test_own_words_of_another_rank_are_no_wrong_caption(tmp_path: Path) -> None:
    own = [tuple(ids[mask].tolist()) for ids, mask in zip(*make_rows().text, strict=True)]
    assert own[:3] == own[4:7], "or nothing is tried"
    ranks = run_ranks(work, RANKS, folder=tmp_path)
    together = [first + second for first, second in zip(*ranks, strict=True)]
    for step in together:
        assert all(said != mine for said, mine in zip(step, own, strict=True))
    assert together == draw(0, None)
