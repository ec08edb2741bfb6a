"""Re-ranking against a plain nested loop over queries and candidates, one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from m2_encoder import M2Encoder, UserError
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation import rerank as module
from m2_encoder.evaluation.metrics import pairs_of_equal_ids
from m2_encoder.evaluation.rerank import RerankingModel, first_candidates, rerank, rerank_set
from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from m2_encoder.types import TextTokens
from tests.support.models import random_images, random_model, random_text, small_config

CONFIG = small_config(drop_path_rate=0.2)
LENGTHS = [3, 9, 5, 5, 12, 7, 4, 8, 6, 10]


class Tokenizer:
    """Characters to ids."""

    def __call__(self, texts: Sequence[str], /) -> TextTokens:
        width = max(map(len, texts)) + 3
        ids = torch.full((len(texts), width), 7)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor([ord(letter) % CONFIG.vocab_size for letter in text])
        return TextTokens(ids, torch.arange(width) < torch.tensor([len(text) for text in texts])[:, None])


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(0)
    return random_model(CONFIG, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(CONFIG.embed_dim, 1, dtype=torch.float64).requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return random_images(CONFIG, 6, dtype=torch.float64)


@pytest.fixture
def text() -> TextTokens:
    return random_text(CONFIG, LENGTHS, padded_to=14)


def plain_score(model: M2Encoder, head: nn.Linear, image: Tensor, ids: Tensor, *, text_expert: bool = False) -> float:
    """One image, (3, S, S), and one text without padding, (T,)."""
    seen = model.encode_image_backbone(image[None])
    read = model.encode_text_backbone(TextTokens(ids[None], torch.ones_like(ids, dtype=torch.bool)[None]))
    both = torch.cat([seen, read], dim=1)
    fused = model.vl_encoder(both, num_image_tokens=seen.shape[1] if text_expert else both.shape[1])
    return float(fused[0, seen.shape[1]] @ head.weight[0] + head.bias[0])


def plain_order(similarity: list[float], scores: list[float], k: int) -> list[int]:
    """The first K rows by similarity, then those by score; ties in the order before."""
    first = sorted(range(len(similarity)), key=lambda row: -similarity[row])[:k]
    return sorted(first, key=lambda row: -scores[row])


@pytest.mark.parametrize("text_expert", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 10, 99])
def test_order_is_that_of_the_nested_loop(
    model: M2Encoder, head: nn.Linear, images: Tensor, text: TextTokens, k: int, text_expert: bool
) -> None:
    seen, read = model.encode_image(images), model.encode_text(text)
    similarity = seen @ read.t()
    scores = torch.tensor(
        [
            [
                plain_score(model, head, image, ids[mask], text_expert=text_expert)
                for ids, mask in zip(*text, strict=True)
            ]
            for image in images
        ],
        dtype=torch.float64,
    )
    found = rerank(model.train(), head, images, text, seen, read, k=k, text_expert=text_expert, chunk_size=4)
    assert model.training, "its mode is restored"
    model.eval()
    for image, row in enumerate(found.texts.reordered().tolist()):
        assert row == plain_order(similarity[image].tolist(), scores[image].tolist(), k)
    for caption, row in enumerate(found.images.reordered().tolist()):
        assert row == plain_order(similarity[:, caption].tolist(), scores[:, caption].tolist(), k)
    torch.testing.assert_close(found.texts.scores, scores.gather(1, found.texts.rows), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.images.scores, scores.t().gather(1, found.images.rows), rtol=1e-9, atol=1e-10)
    assert found.texts.rows.shape == (6, min(k, 10))
    assert found.images.rows.shape == (10, min(k, 6))


def test_ties_keep_the_order_of_the_features(model: M2Encoder, images: Tensor, text: TextTokens) -> None:
    flat = nn.Linear(CONFIG.embed_dim, 1, dtype=torch.float64).requires_grad_(False)
    nn.init.zeros_(flat.weight)
    seen, read = model.encode_image(images), model.encode_text(text)
    found = rerank(model, flat, images, text, seen, read, k=4)
    assert torch.equal(found.texts.reordered(), (seen @ read.t()).argsort(dim=1, descending=True)[:, :4])
    assert torch.equal(found.images.reordered(), (read @ seen.t()).argsort(dim=1, descending=True)[:, :4])


def test_texts_with_equal_words_score_exactly_the_same(
    model: M2Encoder, head: nn.Linear, images: Tensor, text: TextTokens
) -> None:
    rows = torch.tensor([0, 1, 2, 1, 4, 1])
    mask = text.mask[rows]
    ids = torch.where(mask, text.ids[rows], torch.randint(0, CONFIG.vocab_size, mask.shape))  # padding means nothing
    read = model.encode_text(TextTokens(ids, mask))
    found = rerank(model, head, images, TextTokens(ids, mask), model.encode_image(images), read, k=6, chunk_size=2)
    scores = torch.zeros(6, 6, dtype=torch.float64).scatter(1, found.texts.rows, found.texts.scores)
    assert torch.equal(scores[:, 1], scores[:, 3])
    assert torch.equal(scores[:, 1], scores[:, 5])
    assert not torch.equal(scores[:, 1], scores[:, 2])


def test_cost_is_each_item_once_and_each_pair_once(
    model: M2Encoder, head: nn.Linear, images: Tensor, text: TextTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"images": 0, "texts": 0, "pairs": 0}
    largest = dict(counts)

    def counted(name: str, kind: str, place: int) -> None:
        original = getattr(M2Encoder, name)

        def call(*given: object, **named: object) -> object:
            values = given[place]
            size = len(values.ids if isinstance(values, TextTokens) else values)  # type: ignore[arg-type]
            counts[kind] += size
            largest[kind] = max(largest[kind], size)
            return original(*given, **named)

        monkeypatch.setattr(M2Encoder, name, call)

    seen, read = model.encode_image(images), model.encode_text(text)
    counted("encode_image_backbone", "images", 1)
    counted("encode_text_backbone", "texts", 1)
    counted("fuse", "pairs", 2)
    found = rerank(model, head, images, text, seen, read, k=3, chunk_size=4)
    wanted = {(image, row) for image, rows in enumerate(found.texts.rows.tolist()) for row in rows}
    wanted |= {(row, caption) for caption, rows in enumerate(found.images.rows.tolist()) for row in rows}
    assert counts == {"images": 6, "texts": 10, "pairs": len(wanted)}
    assert max(largest.values()) <= 4


def test_candidates_are_the_first_and_right_ones_stand_behind_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", 2)
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    gallery = torch.tensor([[0.9, 0.1], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert first_candidates(queries, gallery, k=2).tolist() == [[1, 2], [3, 0], [1, 2]]
    right = torch.tensor([[0, 1], [1, 3], [2, 2]])
    assert first_candidates(queries, gallery, k=2, right=right).tolist() == [[2, 1], [3, 0], [1, 2]]


class Fixed:
    """Images and texts that are nothing but a number: the first pixel and the first id."""

    def trim_text(self, text: TextTokens) -> TextTokens:
        return text

    def encode_image_backbone(self, images: Tensor) -> Tensor:
        return images[:, :1, 0, :1]

    def encode_text_backbone(self, tokens: TextTokens) -> Tensor:
        return tokens.ids[..., None].float()


def score_by(table: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let matching scores be those of a table, (numbers of images, first ids)."""

    def score(_: object, __: object, image_hidden: Tensor, text_hidden: Tensor, mask: Tensor, **___: object) -> Tensor:
        assert mask[:, 0].all()
        return table[image_hidden[:, 0, 0].long(), text_hidden[:, 0, 0].long()]

    monkeypatch.setattr(module, "score_hidden", score)


def make_set(model: M2Encoder) -> RetrievalSet:
    torch.manual_seed(4)
    words = {"zh": ("ab", "ab", "cde", "fg", "hi", "ab"), "en": ("abc", "abcd", "xyzuv", "abc", "qrs", "w")}
    keys = ("a", "a", "b", "c", "d", "e")  # several images may share a key, and so the captions
    return RetrievalSet("set", keys, random_images(model.config, 6, dtype=torch.float64), words)


def test_a_head_that_says_nothing_changes_no_number(model: M2Encoder) -> None:
    flat = nn.Linear(CONFIG.embed_dim, 1, dtype=torch.float64).requires_grad_(False)
    nn.init.zeros_(flat.weight)
    dataset = make_set(model)
    for blind in (False, True):
        features = encode_set(model, dataset, Tokenizer())
        if blind:  # all similarities are equal: nothing may be found, whatever the order of the rows
            ones = torch.ones_like(features.image_features)
            texts = {code: t._replace(features=torch.ones_like(t.features)) for code, t in features.texts.items()}
            features = features._replace(image_features=ones, texts=texts)
        plain = evaluate_features(features, ks=(1, 2, 3))
        for k in (1, 2, 3, 50):
            again = rerank_set(model, flat, dataset, features, Tokenizer(), k=k, ks=(1, 2, 3), chunk_size=3)
            assert set(again) == {"zh", "en"}
            for language, metrics in again.items():
                assert metrics == {name: plain[language][name] for name in metrics}
                assert "mean_recall" in metrics


def expected_recalls(
    similarity: Tensor, table: Tensor, own: Tensor, theirs: Tensor, *, k: int, ks: Sequence[int]
) -> dict[int, float]:
    """By sorting in plain Python: wrong before right among equals."""
    hits = dict.fromkeys(ks, 0)
    for query in range(len(own)):
        right = [bool(theirs[item] == own[query]) for item in range(len(theirs))]
        order = sorted(range(len(theirs)), key=lambda item: (-float(similarity[query, item]), right[item]))
        order = sorted(order[:k], key=lambda item: -float(table[query, item])) + order[k:]
        wrong_ahead = next(place for place, item in enumerate(order) if right[item])
        wrong_ahead = sum(not right[item] for item in order[:wrong_ahead])
        for cut in ks:
            hits[cut] += wrong_ahead < cut
    return {cut: 100.0 * number / len(own) for cut, number in hits.items()}


@pytest.mark.parametrize("k", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("seed", range(4))
def test_recalls_are_those_of_plain_sorting(k: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several captions per image, several images per caption, ties in both stages."""
    torch.manual_seed(seed)
    number = 9
    keys = tuple(f"k{int(value)}" for value in torch.randint(0, 5, (number,)))
    captions = tuple(chr(ord("A") + row) for row in range(number))  # ids of one letter, all different
    pictures = torch.arange(number).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
    dataset = RetrievalSet("set", keys, pictures, {"en": captions})
    rounded = torch.randint(-2, 3, (number, CONFIG.feature_dim)).float()

    class Plain(Fixed):
        def encode_image(self, images: Tensor, /) -> Tensor:
            return rounded[images[:, 0, 0, 0].long()]

        def encode_text(self, text: TextTokens, /) -> Tensor:
            return rounded.flip(0)[(text.ids[:, 0] - ord("A") % CONFIG.vocab_size) % CONFIG.vocab_size]

    table = torch.randint(-2, 3, (number, CONFIG.vocab_size)).float()
    score_by(table, monkeypatch)
    plain = cast(RerankingModel, Plain())
    features = encode_set(plain, dataset, Tokenizer())
    texts = features.texts["en"]
    found = rerank_set(plain, nn.Linear(1, 1), dataset, features, Tokenizer(), k=k, ks=(1, 2, 3, 8), chunk_size=4)["en"]
    similarity = features.image_features.double() @ texts.features.double().t()
    scores = table[:, Tokenizer()(texts.texts).ids[:, 0]]
    i2t = expected_recalls(similarity, scores, features.image_ids, texts.ids, k=k, ks=(1, 2, 3, 8))
    t2i = expected_recalls(similarity.t(), scores.t(), texts.ids, features.image_ids, k=k, ks=(1, 2, 3, 8))
    assert {cut: found[f"i2t_r@{cut}"] for cut in i2t} == pytest.approx(i2t)
    assert {cut: found[f"t2i_r@{cut}"] for cut in t2i} == pytest.approx(t2i)
    assert found["mean_recall"] == pytest.approx(sum([*i2t.values(), *t2i.values()]) / 8)
    assert (found["num_images"], found["num_texts"]) == (number, number)


def test_a_perfect_head_finds_whatever_is_among_the_candidates(
    model: M2Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("abc", "bcd", "xyz", "def", "qrs", "wxy")  # each starts with a letter of its own
    dataset = make_set(model)._replace(captions={"en": words})
    features = encode_set(model, dataset, Tokenizer())
    pairs = pairs_of_equal_ids(features.image_ids, features.texts["en"].ids)
    assert len(pairs) > 6, "several captions per image"
    plain = evaluate_features(features, ks=(1, 3))["en"]
    table = torch.full((6, CONFIG.vocab_size), -1.0)
    firsts = Tokenizer()(features.texts["en"].texts).ids[:, 0]
    for image, caption in pairs.tolist():
        table[image, firsts[caption]] = 1.0
    numbered = dataset._replace(images=torch.arange(6).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).float())
    score_by(table, monkeypatch)
    oracle = cast(RerankingModel, Fixed())  # features are given
    found = rerank_set(oracle, nn.Linear(1, 1), numbered, features, Tokenizer(), k=3, ks=(1, 3))["en"]
    for direction in ("i2t", "t2i"):
        assert found[f"{direction}_r@1"] == found[f"{direction}_r@3"] == plain[f"{direction}_r@3"]
    assert plain["t2i_r@1"] < plain["t2i_r@3"] < 100, "there was something to gain, and something beyond reach"


def test_bad_input_is_refused(model: M2Encoder, head: nn.Linear, images: Tensor, text: TextTokens) -> None:
    seen, read = model.encode_image(images), model.encode_text(text)
    with pytest.raises(UserError, match="k=0 must be at least 1"):
        rerank(model, head, images, text, seen, read, k=0)
    with pytest.raises(UserError, match="6 images and 10 texts have 5 and 10 features"):
        rerank(model, head, images, text, seen[1:], read, k=2)
    with pytest.raises(UserError, match=r"must be \(Q, E\) and \(M, E\)"):
        first_candidates(seen, read[:, 1:], k=2)
    broken = nn.Linear(CONFIG.embed_dim, 1, dtype=torch.float64).requires_grad_(False)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(ValueError, match="matching scores are not finite"):
        rerank(model, broken, images, text, seen, read, k=2)
