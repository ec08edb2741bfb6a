"""The second round of a step: wrong pairs, chosen by the features of all rows, in the vision-language layers.

Where the first round's hidden states are still there (one piece, or no recomputation), they serve again: only the wrong
captions, which come from all ranks of the group, are encoded anew. Where they are not, each piece is encoded again with
its wrong images and captions, as one more segment of checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalTerms, ObjectiveInputs, PairObjective
from m2_encoder.objectives.passes import HardPairs, PiecePairs, PiecePasses
from m2_encoder.training.micro_batches import encode_pieces, split_rows
from m2_encoder.types import ImageTextBatch, TextTokens


class _Piece(NamedTuple):
    """One piece: its rows and their wrong partners; images of those, or their hidden states where they are at hand."""

    batch: ImageTextBatch
    wrong: HardPairs
    wrong_images: Tensor | None
    wrong_image_hidden: Tensor | None
    passes: PiecePasses | None


def evaluate_pairs(
    model: M2Encoder,
    objectives: Mapping[str, PairObjective],
    inputs: ObjectiveInputs,
    *,
    first_round: Sequence[PiecePasses],
    micro_batches: int,
    recompute: bool,
) -> dict[str, LocalTerms]:
    """Choose wrong partners and look at the pairs; collective in the contrastive group.

    Args:
        model: whole or sharded.
        objectives: by name.
        inputs: features of all rows, and the batch.
        first_round: the passes of every piece, if they are kept; otherwise empty.
        micro_batches: number of pieces.
        recompute: keep no activations of a piece; encode it again in backward.

    Returns:
        Terms of all captions of this rank, by objective.
    """
    found = {}
    for name, objective in objectives.items():
        pieces = _split(inputs, objective.select(inputs), first_round, micro_batches)
        encode = partial(_encode, model, objective)
        sums, counts, *scores = encode_pieces(encode, pieces, recompute=recompute and not first_round)
        found[name] = LocalTerms(sums, counts, dict(zip(objective.score_names, scores, strict=True)))
    return found


def _split(
    inputs: ObjectiveInputs, wrong: HardPairs, first_round: Sequence[PiecePasses], micro_batches: int
) -> list[_Piece]:
    assert inputs.batch is not None, "the training module gives the batch"
    batches = split_rows(inputs.batch, micro_batches)
    hidden = torch.cat([passes.image_hidden for passes in first_round]) if first_round else None
    size = len(wrong.image_rows) // micro_batches
    pieces = []
    for number, batch in enumerate(batches):
        own = slice(number * size, (number + 1) * size)
        rows = wrong.image_rows[own]
        text = TextTokens(wrong.text.ids[own], wrong.text.mask[own])
        pieces.append(
            _Piece(
                batch,
                HardPairs(text, wrong.has_text[own], rows, wrong.has_image[own]),
                None if hidden is not None else inputs.batch.images[rows],
                None if hidden is None else hidden[rows],
                first_round[number] if first_round else None,
            )
        )
    return pieces


def _encode(model: M2Encoder, objective: PairObjective, piece: _Piece) -> tuple[Tensor, ...]:
    passes = piece.passes
    if passes is None:
        passes = PiecePasses(model, piece.batch, allowed=frozenset())
    hidden = piece.wrong_image_hidden
    if hidden is None:
        assert piece.wrong_images is not None, "one of the two is there"
        hidden = model.encode_image_backbone(piece.wrong_images)
    terms: LocalTerms = objective(PiecePairs(model, passes, piece.wrong, hidden, text_expert=objective.text_expert))
    return (terms.sums, terms.counts, *(terms.scores[name] for name in objective.score_names))
