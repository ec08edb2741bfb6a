"""A set, encoded and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import FeatureModel
from m2_encoder.evaluation.metrics import RECALL_KS
from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from m2_encoder.types import TextTokens


class OneHotModel:
    """An image's first pixel and a text's first token are the number of the concept it means."""

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.eye(6)[images[:, 0, 0, 0].long()]

    def encode_text(self, text: TextTokens) -> Tensor:
        return torch.eye(6)[text.ids[:, 0]]


def tokenize(texts: tuple[str, ...]) -> TextTokens:
    ids = torch.tensor([[int(text.rpartition(" ")[2])] for text in texts])
    return TextTokens(ids, torch.ones_like(ids, dtype=torch.bool))


def evaluate_retrieval(
    model: FeatureModel, dataset: RetrievalSet, *, ks: Sequence[int] = RECALL_KS
) -> dict[str, dict[str, float]]:
    return evaluate_features(encode_set(model, dataset, tokenize), ks=ks)


def make_set(keys: str, pixels: list[int], zh: list[int], en: list[int]) -> RetrievalSet:
    images = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    captions = {"zh": tuple(f"概念 {n}" for n in zh), "en": tuple(f"concept {n}" for n in en)}
    return RetrievalSet("toy", tuple(keys), images, captions)


def test_languages_are_measured_apart() -> None:
    dataset = make_set("abcd", [0, 1, 2, 3], zh=[0, 1, 2, 3], en=[0, 1, 3, 2])
    results = evaluate_retrieval(OneHotModel(), dataset, ks=[1])
    assert results["zh"]["mean_recall"] == 100
    assert results["en"]["t2i_r@1"] == results["en"]["i2t_r@1"] == 50
    assert list(results) == ["zh", "en"]


def test_images_of_one_concept_share_a_caption() -> None:
    dataset = make_set("aab", [0, 4, 1], zh=[0, 0, 1], en=[0, 0, 1])
    encoded = encode_set(OneHotModel(), dataset, tokenize)
    assert encoded.texts["en"].texts == ("concept 0", "concept 1")
    assert encoded.image_ids.tolist() == [0, 0, 1]
    metrics = evaluate_retrieval(OneHotModel(), dataset, ks=[1])["en"]
    assert metrics["num_texts"] == 2
    assert metrics["t2i_r@1"] == 100  # one of the two images is enough
    assert metrics["i2t_r@1"] == pytest.approx(200 / 3)  # the other one finds nothing
    assert metrics["t2i_chance@1"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)


def test_same_words_for_two_concepts_stay_two_queries() -> None:
    dataset = make_set("ab", [0, 1], zh=[0, 1], en=[0, 0])
    metrics = evaluate_retrieval(OneHotModel(), dataset, ks=[1])["en"]
    assert metrics["num_texts"] == 2
    assert metrics["t2i_r@1"] == 50
    assert metrics["i2t_r@1"] == 0  # both texts look the same: the hardest order counts


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (RetrievalSet("toy", (), torch.empty(0, 3, 2, 2), {"en": ()}), "'toy' is empty"),
        (make_set("ab", [0, 1], zh=[0, 1], en=[0]), "2 keys but {'en': 1}"),
        (make_set("ab", [0], zh=[0, 1], en=[0, 1]), "2 keys but {'images': 1}"),
    ],
)
def test_broken_sets_are_refused(dataset: RetrievalSet, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(OneHotModel(), dataset)


def test_broken_model_is_refused() -> None:
    class NanModel(OneHotModel):
        def encode_text(self, text: TextTokens) -> Tensor:
            return super().encode_text(text).index_fill(0, torch.tensor([1]), math.nan)

    dataset = make_set("abc", [0, 1, 2], zh=[0, 1, 2], en=[0, 1, 2])
    with pytest.raises(ValueError, match="1 of 3 zh text features are not finite"):
        evaluate_retrieval(NanModel(), dataset)
