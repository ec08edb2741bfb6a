"""Image-text retrieval of a model on a set, one language at a time.

Letters: n images · m distinct captions · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import DEFAULT_BATCH_SIZE, FeatureModel, Tokenize, encode_images, encode_texts
from m2_encoder.evaluation.measures.result import check_finite
from m2_encoder.evaluation.metrics import RECALL_KS, retrieval_metrics


class TextFeatures(NamedTuple):
    """Distinct captions of one language, each (key, caption) once."""

    texts: tuple[str, ...]  # captions, length m
    ids: Tensor  # which key each describes, (m,) int64
    features: Tensor  # (m, E) fp32


class SetFeatures(NamedTuple):
    """Features of a retrieval set."""

    image_features: Tensor  # (n, E) fp32
    image_ids: Tensor  # number of each image's key in the order of first appearance, (n,) int64
    texts: dict[str, TextFeatures]  # by language


def encode_set(
    model: FeatureModel, dataset: RetrievalSet, tokenizer: Tokenize, *, batch_size: int = DEFAULT_BATCH_SIZE
) -> SetFeatures:
    """Encodes every image once and every query of every language once.

    Every caption is a query once; all images of its key are right for it. Equal captions of two keys stay two queries,
    each right for its own key alone. Images without a caption in a language are in its gallery.

    Raises:
        ValueError: for an empty set, or one whose parts differ in length.
    """
    _check_set(dataset)
    encoded = {}
    for language in dataset.languages:
        queries = dataset.queries(language)
        texts = tuple(text for _, text in queries)
        features = encode_texts(model, texts, tokenizer, batch_size=batch_size)
        encoded[language] = TextFeatures(texts, torch.tensor([number for number, _ in queries]), features)
    image_features = encode_images(model, dataset.images, batch_size=batch_size)
    return SetFeatures(image_features, torch.tensor(dataset.numbers()), encoded)


def evaluate_features(features: SetFeatures, *, ks: Sequence[int] = RECALL_KS) -> dict[str, dict[str, float]]:
    """`retrieval_metrics` of an encoded set, by language.

    Raises:
        UserError: if a feature is not finite; recalls would hide that the model is broken.
    """
    results = {}
    for language, texts in features.texts.items():
        check_finite({"image": features.image_features, f"{language} text": texts.features})
        results[language] = retrieval_metrics(
            features.image_features, features.image_ids, texts.features, texts.ids, ks=ks
        )
    return results


def _check_set(dataset: RetrievalSet) -> None:
    if not dataset.keys or not dataset.languages:
        raise ValueError(f"retrieval set {dataset.name!r} is empty")
    lengths = {"images": len(dataset.images), **{name: len(texts) for name, texts in dataset.captions.items()}}
    wrong = {name: length for name, length in lengths.items() if length != len(dataset.keys)}
    if wrong:
        raise ValueError(f"retrieval set {dataset.name!r} has {len(dataset.keys)} keys but {wrong}")
