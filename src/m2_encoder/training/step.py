"""The passes of one training step: features of all rows of a rank, and the terms of local and pair objectives.

*Batch accumulation*: a rank's rows are encoded in pieces (micro-batches), by `m2_encoder.objectives.pieces`.

*Second round*: the features of all rows select hard negatives, which then pass the vision-language layers. If the
states of the first round are kept (one piece, or no recomputation), only the wrong captions, which come from all ranks
of the group, are encoded anew. Otherwise each piece is encoded again with its wrong images and captions, as one more
checkpointed segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.two_towers import Encoder
from m2_encoder.objectives.base import (
    FeaturePair,
    LocalObjective,
    LocalTerms,
    ObjectiveInputs,
    ObjectiveOutput,
    PairObjective,
    TermObjective,
)
from m2_encoder.objectives.passes import HardPairs, PiecePairs, PiecePasses
from m2_encoder.objectives.pieces import encode_pieces
from m2_encoder.types import HeadFeatures, ImageTextBatch, TextTokens


def split_rows(batch: ImageTextBatch, micro_batches: int) -> list[ImageTextBatch]:
    """Split a batch into equal pieces, in order.

    Raises:
        UserError: if the rows cannot be divided.
    """
    rows = batch.images.shape[0]
    if rows % micro_batches:
        raise UserError(
            f"strategy.micro_batches={micro_batches} must divide the {rows} rows of a rank; "
            "change it or data.global_batch_size"
        )
    if micro_batches == 1:
        return [batch]
    size = rows // micro_batches
    return [batch.rows(slice(first, first + size)) for first in range(0, rows, size)]


class EncodedStep(NamedTuple):
    """Result of the first round, for all rows of this rank."""

    heads: dict[str, FeaturePair]  # by head; empty if no objective needs features
    terms: dict[str, LocalTerms]  # of the local objectives, by name
    passes: tuple[PiecePasses, ...] = ()  # of every piece, if they are kept for the second round


class StepEncoder:
    """Runs the first round: the passes for features and local objectives.

    Args:
        model: whole or sharded.
        local: local objectives of this step, by name.
        trains_features: whether any objective compares features.
        trains_backbone_features: whether any trains the backbone's head, too.
        keeps_passes: return the passes for a second round, unless they are recomputed.
    """

    def __init__(
        self,
        model: Encoder,
        local: Mapping[str, LocalObjective],
        *,
        trains_features: bool,
        trains_backbone_features: bool,
        keeps_passes: bool = False,
    ) -> None:
        self._model = model
        self._local = local
        self._num_heads = (2 if trains_backbone_features else 1) if trains_features else 0
        self._keeps_passes = keeps_passes
        self._allowed = frozenset().union(*(objective.passes for objective in local.values()))
        self._text_expert = any(objective.text_expert for objective in local.values())

    def encode(self, batch: ImageTextBatch, *, micro_batches: int, recompute: bool) -> EncodedStep:
        """Encode this rank's rows in pieces; `recompute` as in `encode_pieces`."""
        pieces = split_rows(batch, micro_batches)
        keeps = self._keeps_passes and not (recompute and len(pieces) > 1)
        if self._local or keeps:
            kept: list[PiecePasses] = []
            encode = partial(self._encode_piece, kept=kept if keeps else None)
            flat = encode_pieces(encode, pieces, recompute=recompute)
            image, text = flat[: self._num_heads], flat[self._num_heads : 2 * self._num_heads]
            return EncodedStep(self._pair(image, text), self._take_terms(flat[2 * self._num_heads :]), tuple(kept))
        # Without local objectives, images and texts are encoded apart: then only one of them is recomputed at a time.
        image = encode_pieces(self._encode_images, pieces, recompute=recompute)
        text = encode_pieces(self._encode_texts, pieces, recompute=recompute)
        return EncodedStep(self._pair(image, text), {})

    def _encode_images(self, piece: ImageTextBatch) -> tuple[Tensor, ...]:
        if self._num_heads == 2:
            return _tensors(self._whole().encode_image_heads(piece.images))
        return (self._model.encode_image(piece.images),)

    def _encode_texts(self, piece: ImageTextBatch) -> tuple[Tensor, ...]:
        if self._num_heads == 2:
            return _tensors(self._whole().encode_text_heads(piece.text))
        return (self._model.encode_text(piece.text),)

    def _encode_piece(self, piece: ImageTextBatch, *, kept: list[PiecePasses] | None) -> tuple[Tensor, ...]:
        """Features of images, of captions, then the terms of each local objective, as one flat tuple."""
        passes = PiecePasses(self._whole(), piece, allowed=self._allowed, text_expert=self._text_expert)
        if kept is not None:
            kept.append(passes)
        flat: list[Tensor] = []
        if self._num_heads:
            for heads in (passes.image_heads, passes.text_heads):
                flat += _tensors(heads)[: self._num_heads]
        for objective in self._local.values():
            flat += _flatten(objective, objective(passes))
        return tuple(flat)

    def _take_terms(self, flat: tuple[Tensor, ...]) -> dict[str, LocalTerms]:
        terms: dict[str, LocalTerms] = {}
        for name, objective in self._local.items():
            size = 2 + len(objective.score_names)
            terms[name], flat = _unflatten(objective, flat[:size]), flat[size:]
        return terms

    def _pair(self, image: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> dict[str, FeaturePair]:
        pairs = map(FeaturePair, image, text, self._model.logit_scales())
        return dict(zip(HeadFeatures._fields, pairs, strict=False))

    def _whole(self) -> M2Encoder:
        """The model, for what features alone do not need."""
        assert isinstance(self._model, M2Encoder), "objectives that need more are refused at the start"
        return self._model


class _PairPiece(NamedTuple):
    """One piece of the second round."""

    batch: ImageTextBatch
    wrong: HardPairs  # hard negatives of its captions
    wrong_images: Tensor  # a wrong image for each caption: its backbone states if there are `passes`, else its pixels
    passes: PiecePasses | None  # of the first round; None if they are run again


def evaluate_pairs(
    model: Encoder,
    objectives: Mapping[str, PairObjective],
    inputs: ObjectiveInputs,
    *,
    first_round: Sequence[PiecePasses],
    micro_batches: int,
    recompute: bool,
) -> dict[str, LocalTerms]:
    """The second round: terms of all captions of this rank, by objective; collective in the contrastive group.

    Args:
        model: whole or sharded.
        objectives: by name.
        inputs: features of all rows, and the batch.
        first_round: `EncodedStep.passes`.
        micro_batches: number of pieces.
        recompute: as in `encode_pieces`.
    """
    found = {}
    for name, objective in objectives.items():
        assert isinstance(model, M2Encoder), "objectives of pairs are refused for others at the start"
        pieces = _split(inputs, objective.select(inputs), first_round, micro_batches)
        encode = partial(_encode_pairs, model, objective)
        found[name] = _unflatten(objective, encode_pieces(encode, pieces, recompute=recompute and not first_round))
    return found


def mean_terms(terms: Mapping[str, LocalTerms]) -> dict[str, ObjectiveOutput]:
    """Means over the terms of all ranks; collective if there are terms, with the same names on every rank.

    The loss of a rank is its sum, divided by the ranks' mean count. Gradients are averaged over ranks; so averaged, it
    is the mean over all terms.
    """
    if not terms:
        return {}
    counts = torch.stack([each.counts.sum().to(each.sums.dtype) for each in terms.values()])
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        dist.all_reduce(counts)
    outputs = {}
    for (name, each), count in zip(terms.items(), counts.clamp(min=1) / ranks, strict=True):
        own = each.counts.clamp(min=1)
        outputs[name] = ObjectiveOutput(
            loss=each.sums.sum() / count,
            per_sample=(each.sums / own).detach(),
            counts=each.counts,
            scores={score: sums / own for score, sums in each.scores.items()},
        )
    return outputs


def _split(
    inputs: ObjectiveInputs, wrong: HardPairs, first_round: Sequence[PiecePasses], micro_batches: int
) -> list[_PairPiece]:
    assert inputs.batch is not None, "the training module gives the batch"
    batches = split_rows(inputs.batch, micro_batches)
    images = torch.cat([passes.image_hidden for passes in first_round]) if first_round else inputs.batch.images
    size = len(wrong.image_rows) // micro_batches
    pieces = []
    for number, batch in enumerate(batches):
        own = slice(number * size, (number + 1) * size)
        rows = wrong.image_rows[own]
        text = TextTokens(wrong.text.ids[own], wrong.text.mask[own])
        negatives = HardPairs(text, wrong.has_text[own], rows, wrong.has_image[own])
        pieces.append(_PairPiece(batch, negatives, images[rows], first_round[number] if first_round else None))
    return pieces


def _encode_pairs(model: M2Encoder, objective: PairObjective, piece: _PairPiece) -> tuple[Tensor, ...]:
    passes, hidden = piece.passes, piece.wrong_images
    if passes is None:
        passes = PiecePasses(model, piece.batch, allowed=frozenset())
        hidden = model.encode_image_backbone(piece.wrong_images)
    pairs = PiecePairs(model, passes, piece.wrong, hidden, text_expert=objective.text_expert)
    return _flatten(objective, objective(pairs))


def _flatten(objective: TermObjective, terms: LocalTerms) -> tuple[Tensor, ...]:
    return (terms.sums, terms.counts, *(terms.scores[name] for name in objective.score_names))


def _unflatten(objective: TermObjective, flat: tuple[Tensor, ...]) -> LocalTerms:
    sums, counts, *scores = flat
    return LocalTerms(sums, counts, dict(zip(objective.score_names, scores, strict=True)))


def _tensors(heads: HeadFeatures) -> tuple[Tensor, ...]:
    return tuple(features for features in heads if features is not None)
