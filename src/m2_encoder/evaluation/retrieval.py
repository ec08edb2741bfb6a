"""Image-text retrieval of a model on a set, one language at a time.

Legend: n images · m distinct captions · E feature dim · S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import (
    DEFAULT_BATCH_SIZE,
    FeatureModel,
    Tokenize,
    encode_images,
    encode_texts,
)
from m2_encoder.evaluation.metrics import RECALL_KS, retrieval_metrics


class TextFeatures(NamedTuple):
    """Captions of one language, each (key, caption) once."""

    texts: tuple[str, ...]  # captions, length m
    ids: Tensor  # which key each describes, (m,) int64
    features: Tensor  # (m, E) fp32


class SetFeatures(NamedTuple):
    """A set, encoded."""

    image_features: Tensor  # (n, E) fp32
    image_ids: Tensor  # number of each image's key in the order of first appearance, (n,) int64
    texts: dict[str, TextFeatures]  # by language


def encode_set(
    model: FeatureModel,
    dataset: RetrievalSet,
    tokenizer: Tokenize,
    *,
    languages: Sequence[str] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> SetFeatures:
    """Encodes every image once and every distinct caption of every language once.

    Several drawings of one concept carry the same key and caption: that caption is one query, and each of
    the drawings is right for it. The same words for two keys stay two queries, each right for its own key
    alone.

    Args:
        model: on any device; its mode is restored.
        dataset: images and captions.
        tokenizer: the model's own.
        languages: which of the set's languages; None for all.
        batch_size: items per forward pass.

    Raises:
        ValueError: for an empty set, one whose parts differ in length, or a language that it lacks.
    """
    chosen = tuple(dataset.captions) if languages is None else tuple(languages)
    _check_set(dataset, chosen)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(dataset.keys))}
    ids = [numbers[key] for key in dataset.keys]
    encoded = {}
    for language in chosen:
        distinct = tuple(dict.fromkeys(zip(ids, dataset.captions[language], strict=True)))
        texts = tuple(text for _, text in distinct)
        features = encode_texts(model, texts, tokenizer, batch_size=batch_size)
        encoded[language] = TextFeatures(texts, torch.tensor([number for number, _ in distinct]), features)
    image_features = encode_images(model, dataset.images, batch_size=batch_size)
    return SetFeatures(image_features, torch.tensor(ids), encoded)


def evaluate_features(features: SetFeatures, *, ks: Sequence[int] = RECALL_KS) -> dict[str, dict[str, float]]:
    """`retrieval_metrics` of an encoded set, by language.

    Raises:
        ValueError: if a feature is not finite; a model that makes such is broken, and a table would hide it.
    """
    results = {}
    for language, texts in features.texts.items():
        for side, values in (("image", features.image_features), (f"{language} text", texts.features)):
            broken = int((~values.isfinite()).any(dim=1).sum())
            if broken:
                raise ValueError(f"{broken} of {len(values)} {side} features are not finite: the model is broken")
        results[language] = retrieval_metrics(
            features.image_features, features.image_ids, texts.features, texts.ids, ks=ks
        )
    return results


def _check_set(dataset: RetrievalSet, languages: Sequence[str]) -> None:
    if not dataset.keys or not languages:
        raise ValueError(f"retrieval set {dataset.name!r} is empty")
    missing = [language for language in languages if language not in dataset.captions]
    if missing:
        raise ValueError(
            f"retrieval set {dataset.name!r} has no captions in {', '.join(missing)}, "
            f"only in {', '.join(dataset.captions)}"
        )
    lengths = {"images": len(dataset.images), **{name: len(dataset.captions[name]) for name in languages}}
    wrong = {name: length for name, length in lengths.items() if length != len(dataset.keys)}
    if wrong:
        raise ValueError(f"retrieval set {dataset.name!r} has {len(dataset.keys)} keys but {wrong}")
