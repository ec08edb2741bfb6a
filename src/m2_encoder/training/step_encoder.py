"""One step's passes of the model: features of all rows of a rank, and the terms of local objectives, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import FeaturePair, LocalObjective, LocalTerms, ObjectiveOutput
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.training.micro_batches import encode_pieces, split_rows
from m2_encoder.types import HeadFeatures, ImageTextBatch


class EncodedStep(NamedTuple):
    """What a step's objectives are made of.

    Attributes:
        heads: features of all rows of this rank by head; empty if no objective needs features.
        terms: of the local objectives by name, for all captions of this rank.
        passes: those of every piece, for a second round; empty if nobody asked or they are recomputed.
    """

    heads: dict[str, FeaturePair]
    terms: dict[str, LocalTerms]
    passes: tuple[PiecePasses, ...] = ()


class StepEncoder:
    """Runs the passes that a step needs.

    Args:
        model: whole or sharded.
        local: local objectives that count in this step, by name.
        trains_features: whether any objective compares features.
        trains_backbone_features: whether any trains the head on the backbone, too.
        keeps_passes: hand the passes over where they are not recomputed.
    """

    def __init__(
        self,
        model: M2Encoder,
        local: Mapping[str, LocalObjective],
        *,
        trains_features: bool,
        trains_backbone_features: bool,
        keeps_passes: bool = False,
    ) -> None:
        self._model = model
        self._local = local
        self._features = trains_features
        self._backbone_features = trains_backbone_features
        self._keeps_passes = keeps_passes
        self._allowed = frozenset().union(*(objective.passes for objective in local.values()))
        self._text_expert = any(objective.text_expert for objective in local.values())

    def encode(self, batch: ImageTextBatch, *, micro_batches: int, recompute: bool) -> EncodedStep:
        """Encode a batch.

        Args:
            batch: this rank's rows.
            micro_batches: number of pieces.
            recompute: keep no activations of a piece; encode it again in backward.
        """
        pieces = split_rows(batch, micro_batches)
        kept: list[PiecePasses] | None = None
        if self._keeps_passes and not (recompute and len(pieces) > 1):
            kept = []
        if self._local or kept is not None:
            flat = encode_pieces(partial(self._encode_piece, kept=kept), pieces, recompute=recompute)
            image, text, flat = self._take_heads(flat)
            return EncodedStep(self._pair(image, text), self._take_terms(flat), tuple(kept or ()))
        # Without local objectives the modalities do not meet: encoded apart, only one of them is recomputed at a time.
        if self._backbone_features:
            image = encode_pieces(
                lambda piece: _tensors(self._model.encode_image_heads(piece.images)), pieces, recompute=recompute
            )
            text = encode_pieces(
                lambda piece: _tensors(self._model.encode_text_heads(piece.text)), pieces, recompute=recompute
            )
        else:
            image = encode_pieces(lambda piece: (self._model.encode_image(piece.images),), pieces, recompute=recompute)
            text = encode_pieces(lambda piece: (self._model.encode_text(piece.text),), pieces, recompute=recompute)
        return EncodedStep(self._pair(image, text), {})

    def _encode_piece(self, batch: ImageTextBatch, *, kept: list[PiecePasses] | None) -> tuple[Tensor, ...]:
        """Features of both modalities, then sums, counts and scores of each local objective: a row per row each."""
        passes = PiecePasses(self._model, batch, allowed=self._allowed, text_expert=self._text_expert)
        if kept is not None:
            kept.append(passes)
        flat: list[Tensor] = []
        if self._features:
            heads = 2 if self._backbone_features else 1
            flat += [*passes.image_heads[:heads], *passes.text_heads[:heads]]  # type: ignore[list-item]  # both are there
        for objective in self._local.values():
            terms: LocalTerms = objective(passes)
            flat += [terms.sums, terms.counts, *(terms.scores[name] for name in objective.score_names)]
        return tuple(flat)

    def _take_heads(
        self, flat: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        heads = (2 if self._backbone_features else 1) if self._features else 0
        return flat[:heads], flat[heads : 2 * heads], flat[2 * heads :]

    def _take_terms(self, flat: tuple[Tensor, ...]) -> dict[str, LocalTerms]:
        terms: dict[str, LocalTerms] = {}
        rest = iter(flat)
        for name, objective in self._local.items():
            sums, counts = next(rest), next(rest)
            terms[name] = LocalTerms(sums, counts, {score: next(rest) for score in objective.score_names})
        return terms

    def _pair(self, image: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> dict[str, FeaturePair]:
        scales = (self._model.logit_scale, self._model.logit_vl_scale)
        return dict(zip(HeadFeatures._fields, map(FeaturePair, image, text, scales), strict=False))


def mean_terms(terms: Mapping[str, LocalTerms]) -> dict[str, ObjectiveOutput]:
    """Means over the terms of all ranks; collective if there are terms, so every rank calls it with the same names.

    The loss of a rank is its sum over the mean count of the ranks: averaged over ranks, as gradients are, it is the
    mean over all terms, however many each rank has.
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


def _tensors(heads: HeadFeatures) -> tuple[Tensor, ...]:
    return tuple(features for features in heads if features is not None)
