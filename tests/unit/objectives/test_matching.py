"""Matching against the plain encoder, pair by pair; sampling of hard negatives; re-ranking."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain_encoder import PlainEncoder
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.checkpoints.matching_head import head_of_state
from m2_encoder.errors import UserError
from m2_encoder.evaluation.rerank import score_pairs
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives import matching
from m2_encoder.objectives.base import FeaturePair, ObjectiveInputs
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.matching import Content, Matching, sample_negatives
from m2_encoder.objectives.passes import HardPairs
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.objectives import Bench, build_bench, draw_inputs, make_batch


def features_of(module: Bench, batch: ImageTextBatch, step: int = 0) -> ObjectiveInputs:
    pair = FeaturePair(
        module.model.encode_image(batch.images), module.model.encode_text(batch.text), module.model.logit_scale
    )
    return ObjectiveInputs({"features": pair}, batch.identity, None, batch, step)


def plain_score(module: Bench, plain: PlainEncoder, image: Tensor, ids: Tensor) -> Tensor:
    """z of one image, (3, S, S), and one text without padding, (T,)."""
    seen = plain.image(image[None]).backbone
    read = plain.text(ids[None], torch.ones_like(ids)[None]).backbone
    both = torch.cat([seen, read], dim=1)
    everything, padding = torch.ones(both.shape[1], dtype=torch.bool), torch.zeros(both.shape[:2], dtype=torch.bool)
    hidden = plain.encode("backbone_vl", both, everything, padding)[0, seen.shape[1]]
    head = module.objectives["matching"].head
    assert isinstance(head, torch.nn.Linear)
    return hidden @ head.weight[0] + head.bias[0]


def plain_terms(module: Bench, batch: ImageTextBatch, wrong: HardPairs) -> tuple[Tensor, int, int]:
    """Losses of all terms, how many there are, and how many were judged rightly."""
    plain = PlainEncoder(to_official_state(dict(module.model.named_parameters())), num_heads=module.config.num_heads)
    losses, hits = [], 0
    for row in range(len(batch.text.ids)):
        own = row // batch.captions_per_image
        ids = batch.text.ids[row][batch.text.mask[row]]
        terms = [(plain_score(module, plain, batch.images[own], ids), True)]
        if wrong.has_text[row]:
            other = wrong.text.ids[row][wrong.text.mask[row]]
            terms.append((plain_score(module, plain, batch.images[own], other), False))
        if wrong.has_image[row]:
            terms.append((plain_score(module, plain, batch.images[wrong.image_rows[row]], ids), False))
        for score, right in terms:
            losses.append(-torch.log(torch.sigmoid(score if right else -score)))
            hits += bool(score > 0) == right
    return torch.stack(losses).mean(), len(losses), hits


@pytest.mark.parametrize("lonely", [False, True])
@pytest.mark.parametrize(("pieces", "recompute"), [(1, True), (2, False), (4, True)])
def test_loss_and_gradients_are_those_of_the_plain_encoder(pieces: int, recompute: bool, lonely: bool) -> None:
    module = build_bench({"matching": Matching()}, micro_batches=pieces, recompute=recompute)
    batch = make_batch(4, 2)
    if lonely:  # the same content everywhere: nobody has a negative
        batch = batch._replace(identity=torch.zeros(4, dtype=torch.int64))
    objective = module.objectives["matching"]
    assert isinstance(objective, Matching)
    wrong = objective.select(features_of(module, batch))
    assert wrong.has_text.all() != lonely
    output = module.evaluate(batch)["matching"]
    expected, count, hits = plain_terms(module, batch, wrong)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    assert output.counts is not None
    assert int(output.counts.sum()) == count == (8 if lonely else 24)
    assert round(float((output.scores["accuracy"] * output.counts).sum())) == hits
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(output.loss, list(trained.values()))
    theirs = torch.autograd.grad(expected, list(trained.values()))
    for name, own, wanted in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_beside_itc_it_is_drawn_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    select = Matching.select
    monkeypatch.setattr(Matching, "select", lambda *given: calls.append(1) or select(*given))  # type: ignore[func-returns-value]
    module = build_bench({"itc": ImageTextContrastive(), "matching": Matching()}, micro_batches=2, recompute=True)
    outputs = module.evaluate(make_batch(4, 1))
    (outputs["itc"].loss + outputs["matching"].loss).backward()
    assert calls == [1]
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_hidden_states_serve_again_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[int] = []
    encode = M2Encoder.encode_image_backbone

    def counted(self: M2Encoder, given: Tensor, **others: Any) -> Tensor:
        images.append(len(given))
        return encode(self, given, **others)

    monkeypatch.setattr(M2Encoder, "encode_image_backbone", counted)
    build_bench({"matching": Matching()}).evaluate(make_batch(4, 2))
    assert images == [4]


def test_negatives_follow_the_softmax_and_are_never_alike() -> None:
    inputs = draw_inputs(6, 2)
    scale = torch.tensor(3.0, dtype=torch.float64)
    identity = inputs.identity.repeat_interleave(2)
    words = torch.arange(12)
    words[[3, 8]] = 0  # images 1 and 4 come with a caption of image 0's words
    shown = words.view(6, 2)
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    expected = (scale * inputs.image_features @ inputs.text_features.t()).exp().detach()
    expected = expected * (inputs.identity[:, None] != identity) * (shown[:, None] != words[:, None]).all(dim=2)
    expected = expected / expected.sum(dim=1, keepdim=True)
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(draws // 100):
        uniform = torch.rand(600, dtype=torch.float64, generator=generator)
        rows, found = sample_negatives(
            inputs.image_features.detach().repeat(100, 1),
            inputs.text_features.detach(),
            scale,
            Content(inputs.identity.repeat(100), shown.repeat(100, 1)),
            Content(identity, words[:, None]),
            uniform,
        )
        assert found.all()
        seen.update((place % 6, int(row)) for place, row in enumerate(rows))
    for (query, key), count in seen.items():
        assert identity[key] != inputs.identity[query]
        assert words[key] not in shown[query]
        share = float(expected[query, key])
        assert abs(count / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5 + 1e-9
    assert sum(float(expected[place]) > 0.01 for place in [*seen]) > 20, "most possible negatives came"


def list_words(text: TextTokens) -> list[tuple[int, ...]]:
    """Tokens of each caption, without padding."""
    return [tuple(ids[mask].tolist()) for ids, mask in zip(*text, strict=True)]


def with_equal_words(batch: ImageTextBatch) -> ImageTextBatch:
    """All contents differ; image 1's first caption is image 0's second, image 2's first one is its beginning."""
    ids, mask = batch.text.ids.clone(), batch.text.mask.clone()
    mask[1] = torch.arange(mask.shape[1]) < 5
    ids[2], mask[2] = torch.where(mask[1], ids[1], 7), mask[1]  # what stands on padding is no word
    ids[4], mask[4] = ids[1], torch.arange(mask.shape[1]) < 4
    return batch._replace(text=TextTokens(ids, mask), identity=torch.arange(len(batch.identity)))


def test_equal_words_are_never_negatives_whatever_the_identity() -> None:
    module, batch = build_bench({"matching": Matching()}), with_equal_words(make_batch(4, 2))
    inputs = features_of(module, batch)
    flat = inputs.heads["features"]._replace(logit_scale=torch.tensor(0.0))
    words = list_words(batch.text)
    of_image = [set(words[2 * image : 2 * image + 2]) for image in range(4)]
    texts, images = set(), set()
    for step in range(150):
        wrong = Matching().select(inputs._replace(heads={"features": flat}, step=step))
        assert wrong.has_text.all()
        assert wrong.has_image.all()
        texts |= set(enumerate(list_words(wrong.text)))
        images |= set(enumerate(wrong.image_rows.tolist()))
    others = [(row, image) for row in range(8) for image in range(4) if image != row // 2]
    assert texts == {(row, said) for row, image in others for said in of_image[image] - of_image[row // 2]}
    assert images == {(row, image) for row, image in others if words[row] not in of_image[image]}


def test_equal_captions_everywhere_leave_no_partner() -> None:
    module, batch = build_bench({"matching": Matching()}), make_batch(4, 1)
    text = TextTokens(batch.text.ids[:1].repeat(4, 1), batch.text.mask[:1].repeat(4, 1))
    wrong = Matching().select(features_of(module, batch._replace(text=text, identity=torch.arange(4))))
    assert not wrong.has_text.any()
    assert not wrong.has_image.any()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_give_allowed_negatives(edge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_TILE_ELEMENTS", 1)
    inputs = draw_inputs(8, 1)
    own = inputs.identity
    content = Content(own, torch.arange(8)[:, None])
    for scale in (0.0, 1.0, 300.0):
        rows, found = sample_negatives(
            inputs.image_features.detach(),
            inputs.text_features.detach(),
            torch.tensor(scale),
            content,
            content,
            torch.full((8,), edge, dtype=torch.float64),
        )
        assert found.all()
        assert (own[rows] != own).all()


def test_steps_and_seeds_draw_anew() -> None:
    module = build_bench({"matching": Matching()})
    batch = make_batch(8, 2)

    def draw(seed: int, step: int) -> list[int]:
        return Matching(seed=seed).select(features_of(module, batch, step)).image_rows.tolist()

    assert draw(0, 5) == draw(0, 5)
    assert draw(0, 5) != draw(0, 6)
    assert draw(0, 5) != draw(1, 5)
    with pytest.raises(UserError, match="seed=-1"):
        Matching(seed=-1)
    with pytest.raises(UserError, match="needs the batch"):
        Matching().select(features_of(module, batch)._replace(batch=None))


def test_hardness_is_a_factor_of_the_scores_in_the_draw_alone() -> None:
    module, batch = build_bench({"matching": Matching()}), make_batch(16, 2)
    inputs = features_of(module, batch)
    pair = inputs.heads["features"]

    def draw(hardness: float, log_scale: float) -> list[int]:
        heads = {"features": pair._replace(logit_scale=torch.tensor(log_scale, dtype=torch.float64))}
        wrong = Matching(hardness=hardness).select(inputs._replace(heads=heads))
        return [*wrong.image_rows.tolist(), *wrong.text.ids.flatten().tolist()]

    assert draw(0.1, math.log(40)) == draw(1.0, math.log(4)) != draw(1.0, math.log(40))
    assert draw(0.0, 0.0) == draw(0.0, 4.0)
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"hardness={wrong}"):
            Matching(hardness=wrong)


def test_scores_of_pairs() -> None:
    module = build_bench({"matching": Matching()})
    batch = make_batch(3, 1)
    head = module.objectives["matching"].head
    assert isinstance(head, torch.nn.Linear)
    pairs = torch.tensor([[0, 0], [2, 1], [1, 1], [0, 2], [2, 1]])
    scores = score_pairs(module.model, head, batch.images, batch.text, pairs, chunk_size=2)
    plain = PlainEncoder(to_official_state(dict(module.model.named_parameters())), num_heads=module.config.num_heads)
    expected = [
        plain_score(module, plain, batch.images[i], batch.text.ids[j][batch.text.mask[j]]) for i, j in pairs.tolist()
    ]
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=1e-9, atol=1e-12)
    again = score_pairs(
        module.model, head_of_state(module.state_dict(), name="matching").linear, batch.images, batch.text, pairs
    )
    torch.testing.assert_close(again, scores, rtol=1e-9, atol=1e-12)
    assert score_pairs(module.model, head, batch.images, batch.text, pairs[:0]).shape == (0,)
    with pytest.raises(UserError, match=r"holds no objectives\.itm\.head\.weight"):
        head_of_state(module.state_dict(), name="itm")
    with pytest.raises(UserError, match="rows outside of 3 images and 3 texts"):
        score_pairs(module.model, head, batch.images, batch.text, torch.tensor([[0, 3]]))
    with pytest.raises(UserError, match=r"must be \(P, 2\)"):
        score_pairs(module.model, head, batch.images, batch.text, torch.tensor([0, 1]))


def test_it_learns_to_tell_pairs_apart() -> None:
    """A few steps on eight pairs: right pairs score above wrong ones, which re-ranking needs."""
    module = build_bench({"matching": Matching()}).float()
    batch = make_batch(8, 1)
    batch = batch._replace(images=batch.images.float(), identity=torch.arange(8))
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = module.evaluate(batch)["matching"]
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[0] > 0.6
    assert losses[-1] < 0.3
