"""Retrieval in two stages: the K best by features, reordered by a matching head that sees image and text together.

Ties and everything behind the first K keep the order of stage one.

Cost: the backbone encodes every image and every distinct text once; the vision-language layers see each distinct pair
once, at most K per query. Memory: hidden states of texts stay on the CPU, those of `chunk_size` images on the device.

Letters: n images · m texts · Q queries · M gallery items · K candidates · P pairs · T text tokens · D width ·
E feature dim · S image side in pixels.

Reference: ALBEF (arXiv:2107.07651), section 5, and R2D2 (arXiv:2205.03860) rerank in this way; both add the similarity
of features to the score, which is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import FeatureModel, Tokenize, evaluation_mode
from m2_encoder.evaluation.metrics import RECALL_KS, pairs_of_equal_ids, recall_at_k
from m2_encoder.evaluation.retrieval import SetFeatures
from m2_encoder.objectives.matching import PairEncoder, score_hidden
from m2_encoder.types import TextTokens

_TIE_TOLERANCE: Final = 1e-12  # times both norms, as in `metrics`
_CHUNK_ROWS: Final = 1024


class RerankingModel(PairEncoder, FeatureModel, Protocol):
    """Encodes features and fuses pairs, as `M2Encoder` does."""


class Candidates(NamedTuple):
    """The first K of each query."""

    rows: Tensor  # of the gallery, best first by features, (Q, K) int64
    scores: Tensor  # log-odds of the matching head, (Q, K) fp32 at least

    def reordered(self) -> Tensor:
        """Rows of the gallery, best first by the head, (Q, K) int64; equal scores keep their order."""
        return self.rows.gather(1, self.scores.argsort(dim=1, descending=True, stable=True))


class Reranked(NamedTuple):
    """Candidates of both directions."""

    texts: Candidates  # of each image, (n, K)
    images: Candidates  # of each text, (m, K)


def rerank(
    model: RerankingModel,
    head: nn.Linear,
    images: Tensor,
    text: TextTokens,
    image_features: Tensor,
    text_features: Tensor,
    *,
    k: int,
    text_expert: bool = False,
    chunk_size: int = 64,
) -> Reranked:
    """Rerank the first K texts of each image, and the first K images of each text.

    Args:
        model: its training mode is restored.
        head: of `Matching`, on the same device and of the same dtype.
        images: (n, 3, S, S), as in `M2Encoder.encode_image`.
        text: (m, T), as the tokenizer returns it.
        image_features: of the images, (n, E).
        text_features: of the texts, (m, E).
        k: K, at least 1; capped at the size of the gallery.
        text_expert: as the head was trained.
        chunk_size: images, texts or pairs per forward pass.

    Raises:
        UserError: for a K below 1, or if items and features differ in number.
        ValueError: if a score is not finite.
    """
    if (len(images), len(text.ids)) != (len(image_features), len(text_features)):
        raise UserError(
            f"{len(images)} images and {len(text.ids)} texts have {len(image_features)} and {len(text_features)} "
            "features; give a row for each"
        )
    texts = first_candidates(image_features, text_features, k=k)
    pictures = first_candidates(text_features, image_features, k=k)
    pairs = _pairs_of(texts, pictures)
    scores = score_pairs(model, head, images, text, pairs, text_expert=text_expert, chunk_size=chunk_size)
    return _join(texts, pictures, scores)


def rerank_set(
    model: RerankingModel,
    head: nn.Linear,
    dataset: RetrievalSet,
    features: SetFeatures,
    tokenizer: Tokenize,
    *,
    k: int,
    text_expert: bool = False,
    chunk_size: int = 64,
    ks: Sequence[int] = RECALL_KS,
) -> dict[str, dict[str, float]]:
    """Recalls of a set after reranking, for all languages in one pass over the images.

    Among candidates of equal similarity wrong ones come first, and equal matching scores keep that order: a head that
    scores all pairs equally changes nothing.

    `features` are those of `dataset`; other arguments are as in `rerank`.

    Returns:
        By language: `i2t_r@k`, `t2i_r@k`, `mean_recall` in percent, `num_images` and `num_texts`.

    Raises:
        UserError: for a K below 1.
        ValueError: if a score is not finite.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    pairs: list[Tensor] = []
    words: list[str] = []
    for language, texts in features.texts.items():
        right = pairs_of_equal_ids(features.image_ids, texts.ids)
        candidates = first_candidates(features.image_features, texts.features, k=k, right=right)
        pictures = first_candidates(texts.features, features.image_features, k=k, right=right.flip(1))
        found[language] = candidates, pictures
        pairs.append(_pairs_of(candidates, pictures) + torch.tensor([0, len(words)]))
        words += texts.texts
    text, every = tokenizer(words), torch.cat(pairs)
    scores = score_pairs(model, head, dataset.images, text, every, text_expert=text_expert, chunk_size=chunk_size)
    return {
        language: _recalls(_join(*found[language], part), features, language, ks)
        for language, part in zip(found, scores.split([len(part) for part in pairs]), strict=True)
    }


def first_candidates(queries: Tensor, gallery: Tensor, *, k: int, right: Tensor | None = None) -> Tensor:
    """The K best gallery items of each query by inner products in fp64.

    Args:
        queries: (Q, E), any floating dtype.
        gallery: (M, E).
        k: K, at least 1; capped at M.
        right: pairs of (query, gallery item) that rank behind all others of equal score, (P, 2) int64.

    Returns:
        Rows of the gallery, best first, (Q, K) int64 on the CPU; ties in the order of the rows.

    Raises:
        UserError: for a K below 1, or sides without rows or of different width.
    """
    if k < 1:
        raise UserError(f"k={k} must be at least 1")
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1] or not len(gallery):
        raise UserError(f"features must be (Q, E) and (M, E), got {tuple(queries.shape)} and {tuple(gallery.shape)}")
    queries, gallery = queries.cpu().double(), gallery.cpu().double()
    largest = gallery.norm(dim=1).max()
    right = None if right is None else right.cpu()
    found = []
    for start in range(0, len(queries), _CHUNK_ROWS):
        part = queries[start : start + _CHUNK_ROWS]
        scores = part @ gallery.t()
        if right is not None:
            own = right[(right[:, 0] >= start) & (right[:, 0] < start + len(part))]
            scores[own[:, 0] - start, own[:, 1]] -= (part.norm(dim=1) * largest * _TIE_TOLERANCE)[own[:, 0] - start]
        found.append(scores.argsort(dim=1, descending=True, stable=True)[:, :k])
    return torch.cat(found)


def score_pairs(
    model: RerankingModel,
    head: nn.Linear,
    images: Tensor,
    text: TextTokens,
    pairs: Tensor,
    *,
    text_expert: bool = False,
    chunk_size: int = 64,
) -> Tensor:
    """Matching scores of pairs; equal pairs, and texts of equal words, are scored once and get exactly equal scores.

    Args:
        model: as in `rerank`.
        head: as in `rerank`.
        images: (n, 3, S, S).
        text: (m, T).
        pairs: rows of an image and of a text, (P, 2) int64 on the CPU; in any order, repeated ones too.
        text_expert: as the head was trained.
        chunk_size: images, texts or pairs per forward pass.

    Returns:
        Log-odds that the text describes the image, on the CPU, (P,), fp32 at least.

    Raises:
        UserError: for pairs that are not (P, 2), or rows that do not exist.
        ValueError: if a score is not finite.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise UserError(f"pairs are {tuple(pairs.shape)}; they must be (P, 2): the row of an image and of a text")
    if bool(((pairs < 0) | (pairs >= torch.tensor([len(images), len(text.ids)]))).any()):
        raise UserError(f"pairs name rows outside of {len(images)} images and {len(text.ids)} texts")
    if not len(pairs):
        return torch.empty(0, dtype=torch.promote_types(head.weight.dtype, torch.float32))
    ids, mask = text.ids.cpu(), text.mask.cpu().bool()
    # Texts are equal if ids and masks are; padding may hold any ids.
    marked = torch.cat([ids.masked_fill(~mask, 0), mask.long()], dim=1)
    known, numbers = torch.unique(marked, dim=0, return_inverse=True)
    # Sorted by image.
    places, inverse = (pairs[:, 0] * len(known) + numbers[pairs[:, 1]]).unique(return_inverse=True)
    rows = torch.stack([places // len(known), places % len(known)], dim=1)
    scores = []
    with evaluation_mode(model) as device:
        distinct = TextTokens(known[:, : ids.shape[1]], known[:, ids.shape[1] :].bool())
        states = _TextStates.encode(model, distinct, device=device, chunk_size=chunk_size)
        for start in range(0, len(images), chunk_size):
            bounds = torch.tensor([start, start + chunk_size])
            first, last = torch.searchsorted(rows[:, 0].contiguous(), bounds).tolist()
            if first == last:
                continue
            hidden = model.encode_image_backbone(images[start : start + chunk_size].to(device))
            own = rows[first:last] - torch.tensor([start, 0])
            scores.append(
                _score_chunk(model, head, hidden, states, own, text_expert=text_expert, chunk_size=chunk_size)
            )
    together = torch.cat(scores)
    if broken := int((~together.isfinite()).sum()):
        raise UserError(f"{broken} of {len(rows)} matching scores are not finite: the model or its head is broken")
    return together[inverse]


def _score_chunk(
    model: RerankingModel,
    head: nn.Linear,
    image_hidden: Tensor,
    states: _TextStates,
    rows: Tensor,
    *,
    text_expert: bool,
    chunk_size: int,
) -> Tensor:
    """Scores of pairs of some images, texts of similar length together, (p,) on the CPU."""
    order = states.lengths[rows[:, 1]].argsort(stable=True)
    scores = []
    for part in rows[order].split(chunk_size):
        text_hidden, mask = states.padded(part[:, 1], image_hidden.device)
        seen = image_hidden[part[:, 0].to(image_hidden.device)]
        scores.append(score_hidden(model, head, seen, text_hidden, mask, text_expert=text_expert).cpu())
    return torch.cat(scores)[order.argsort()]


class _TextStates(NamedTuple):
    """Backbone states of texts without padding, concatenated, on the CPU: (sum of lengths, D)."""

    states: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def encode(cls, model: PairEncoder, text: TextTokens, *, device: torch.device, chunk_size: int) -> _TextStates:
        """Encodes each text once; texts of similar length share a forward pass."""
        lengths = text.mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.split(chunk_size):
            tokens = model.trim_text(TextTokens(text.ids[rows].to(device), text.mask[rows].to(device)))
            parts.append(model.encode_text_backbone(tokens)[tokens.mask].cpu())
        ends = lengths[order].cumsum(0)
        return cls(torch.cat(parts), (ends - lengths[order])[order.argsort()], lengths)

    def padded(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """States of some texts, (P, T, D), and their mask, (P, T) bool; T is the longest of them."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths[:, None]
        states = self.states[(self.starts[rows, None] + places).where(mask, 0)]
        return states.to(device), mask.to(device)


def _pairs_of(texts: Tensor, pictures: Tensor) -> Tensor:
    """Pairs of all candidates of both directions, (n * K + m * K', 2): rows of an image and of a text."""
    own = torch.arange(len(texts))[:, None].expand_as(texts)
    theirs = torch.arange(len(pictures))[:, None].expand_as(pictures)
    return torch.cat(
        [torch.stack([own, texts], dim=2).flatten(0, 1), torch.stack([pictures, theirs], dim=2).flatten(0, 1)]
    )


def _join(texts: Tensor, pictures: Tensor, scores: Tensor) -> Reranked:
    """Candidates with their scores, which are in the order of `_pairs_of`."""
    first, second = scores.split([texts.numel(), pictures.numel()])
    return Reranked(Candidates(texts, first.view_as(texts)), Candidates(pictures, second.view_as(pictures)))


def _recalls(reranked: Reranked, features: SetFeatures, language: str, ks: Sequence[int]) -> dict[str, float]:
    texts = features.texts[language]
    metrics: dict[str, float] = {}
    images = (features.image_features, features.image_ids)
    others = (texts.features, texts.ids)
    for direction, candidates, (queries, own), (gallery, theirs) in (
        ("i2t", reranked.texts, images, others),
        ("t2i", reranked.images, others, images),
    ):
        ranks = recall_at_k(queries, gallery, pairs_of_equal_ids(own, theirs), ks).ranks
        is_right = theirs[candidates.reordered()] == own[:, None]
        # All before the first right candidate are wrong. If none is right, the rank of stage one stays.
        ranks = torch.where(is_right.any(dim=1), is_right.long().argmax(dim=1) + 1, ranks)
        for k in ks:
            metrics[f"{direction}_r@{k}"] = 100.0 * float((ranks <= min(k, len(gallery))).double().mean())
    metrics["mean_recall"] = sum(metrics.values()) / len(metrics)
    metrics["num_images"], metrics["num_texts"] = float(len(images[0])), float(len(others[0]))
    return metrics
