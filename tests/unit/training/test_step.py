"""Local objectives: the same losses and gradients as plain formulas, in one piece or several, recomputed or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalObjective, LocalTerms
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.training.step import EncodedStep, StepEncoder, mean_terms
from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens
from tests.support.training import tiny_config

ROWS, CAPTIONS = 4, 2
CONFIG = dataclasses.replace(tiny_config(), image_size=16, patch_size=4)


def make_batch(generator: torch.Generator) -> ImageTextBatch:
    texts, length = ROWS * CAPTIONS, 9
    mask = torch.arange(length) < torch.randint(3, length - 1, (texts, 1), generator=generator)
    ids = torch.randint(5, CONFIG.vocab_size, (texts, length), generator=generator)
    predicted = mask & (torch.rand(mask.shape, generator=generator) < 0.4)
    predicted[0] = False  # a caption without a hidden word
    hidden = torch.where(predicted, torch.randint(5, CONFIG.vocab_size, ids.shape, generator=generator), ids)
    return ImageTextBatch(
        images=torch.rand((ROWS, 3, 16, 16), generator=generator, dtype=torch.float64),
        text=TextTokens(ids, mask),
        language=torch.zeros(texts, dtype=torch.int64),
        identity=torch.arange(ROWS),
        keys=tuple(map(str, range(ROWS))),
        sources=("test",) * ROWS,
        masked_text=MaskedText(hidden, predicted),
        patch_mask=torch.rand((ROWS, 16), generator=generator) < 0.4,
    )


@pytest.fixture
def batch() -> ImageTextBatch:
    return make_batch(torch.Generator().manual_seed(1))


def build(text_expert: bool = False) -> tuple[M2Encoder, dict[str, LocalObjective]]:
    torch.manual_seed(0)
    model = M2Encoder(CONFIG).double()
    with torch.no_grad():
        model.image_embed.mask_token.normal_()
    objectives: dict[str, LocalObjective] = {
        "cmlm": MaskedLanguage(text_expert=text_expert),
        "cmim": MaskedImage(text_expert=text_expert),
    }
    for objective in objectives.values():
        objective.build(CONFIG)
        objective.double()
    return model, objectives


def plain_losses(
    model: M2Encoder, objectives: dict[str, LocalObjective], batch: ImageTextBatch, *, text_expert: bool
) -> tuple[Tensor, Tensor]:
    """CMLM and CMIM caption by caption, without packing, sharing or padding."""
    cmlm, cmim = objectives["cmlm"], objectives["cmim"]
    assert isinstance(cmlm, MaskedLanguage)
    assert isinstance(cmim, MaskedImage)
    assert batch.masked_text is not None
    assert batch.patch_mask is not None
    token_losses, patch_losses = [], []
    for row in range(ROWS * CAPTIONS):
        own = row // CAPTIONS
        length = int(batch.text.mask[row].sum())
        image = model.image_embed(batch.images[own : own + 1])
        image = model.backbone(image, num_image_tokens=17)
        ids = batch.masked_text.ids[row : row + 1, :length]
        text = model.backbone(model.text_embed(ids), num_image_tokens=0)
        split = 17 if text_expert else 17 + length
        hidden = model.vl_encoder(torch.cat([image, text], dim=1), num_image_tokens=split)[0, 17:]
        states = functional.layer_norm(
            functional.gelu(cmlm.head.transform(hidden)), hidden.shape[-1:], cmlm.head.norm.weight, cmlm.head.norm.bias
        )
        logits = states @ model.text_embed.tokens.weight.t() + cmlm.head.bias
        chosen = batch.masked_text.predicted[row, :length]
        losses = functional.cross_entropy(logits, batch.text.ids[row, :length], reduction="none")
        token_losses.append(losses[chosen])

        patch_mask = batch.patch_mask[own : own + 1]
        image = model.backbone(
            model.image_embed(batch.images[own : own + 1], patch_mask=patch_mask), num_image_tokens=17
        )
        text = model.backbone(model.text_embed(batch.text.ids[row : row + 1, :length]), num_image_tokens=0)
        hidden = model.vl_encoder(torch.cat([image, text], dim=1), num_image_tokens=split)[0, 1:17]
        for patch in range(16):
            if patch_mask[0, patch]:
                top, left = divmod(patch, 4)
                pixels = batch.images[own, :, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4].permute(1, 2, 0).flatten()
                target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                patch_losses.append((cmim.targets.head(hidden[patch]) - target).square().mean())
    return torch.cat(token_losses).mean(), torch.stack(patch_losses).mean()


def encode(
    model: M2Encoder, objectives: dict[str, LocalObjective], batch: ImageTextBatch, *, pieces: int, recompute: bool
) -> EncodedStep:
    encoder = StepEncoder(model, objectives, trains_features=True, trains_backbone_features=True)
    return encoder.encode(batch, micro_batches=pieces, recompute=recompute)


@pytest.mark.parametrize("text_expert", [False, True])
@pytest.mark.parametrize(("pieces", "recompute"), [(1, True), (2, False), (4, True)])
def test_losses_and_gradients_are_those_of_plain_formulas(
    batch: ImageTextBatch, pieces: int, recompute: bool, text_expert: bool
) -> None:
    model, objectives = build(text_expert)
    means = mean_terms(encode(model, objectives, batch, pieces=pieces, recompute=recompute).terms)
    expected = plain_losses(model, objectives, batch, text_expert=text_expert)
    found = [means["cmlm"].loss, means["cmim"].loss]
    parameters = [*model.parameters(), *(p for o in objectives.values() for p in o.parameters())]
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(found[0] + 0.3 * found[1], parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected[0] + 0.3 * expected[1], parameters, allow_unused=True)
    touched = 0
    for own_gradient, gradient in zip(ours, theirs, strict=True):
        assert (own_gradient is None) == (gradient is None)
        if own_gradient is not None and gradient is not None:
            torch.testing.assert_close(own_gradient, gradient, rtol=1e-8, atol=1e-13)
            touched += 1
    assert touched > 50


def test_features_are_those_of_the_encoder(batch: ImageTextBatch) -> None:
    model, objectives = build()
    heads = encode(model, objectives, batch, pieces=2, recompute=True).heads
    images, texts = model.encode_image_heads(batch.images), model.encode_text_heads(batch.text)
    for name, pair in heads.items():
        torch.testing.assert_close(pair.image_features, getattr(images, name), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.text_features, getattr(texts, name), rtol=1e-10, atol=1e-12)


def test_scores_and_losses_by_caption(batch: ImageTextBatch) -> None:
    model, objectives = build()
    whole = mean_terms(encode(model, objectives, batch, pieces=1, recompute=False).terms)["cmlm"]
    assert whole.counts is not None
    assert whole.counts[0] == 0 == whole.per_sample[0]
    torch.testing.assert_close((whole.per_sample * whole.counts).sum() / whole.counts.sum(), whole.loss.detach())
    assert 0 <= whole.scores["accuracy"].min() <= whole.scores["accuracy"].max() <= 1


def test_no_term_at_all_is_a_loss_of_nothing() -> None:
    losses = torch.ones(3, requires_grad=True)
    terms = LocalTerms(losses * torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    found = mean_terms({"nothing": terms})["nothing"]
    (10 * found.loss).backward()
    assert found.loss == 0
    assert losses.grad is not None
    assert torch.equal(losses.grad, torch.zeros(3)), "the reciprocal of a tiny number, times 0"


def test_passes_that_nobody_named_are_refused(batch: ImageTextBatch) -> None:
    class Greedy(LocalObjective):
        def terms(self, passes: PiecePasses) -> LocalTerms:
            return LocalTerms(passes.masked_text.sum(dim=(1, 2)), torch.ones(len(passes.text.ids)))

    model, _ = build()
    with pytest.raises(UserError, match="asks for the pass 'masked_text' without naming it"):
        encode(model, {"greedy": Greedy()}, batch, pieces=1, recompute=False)


def test_a_pass_is_run_once_for_all_objectives(batch: ImageTextBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, objectives = build()
    other = MaskedLanguage()
    other.build(CONFIG)
    objectives["again"] = other.double()
    calls: list[str] = []
    for name in ("encode_image_backbone", "encode_text_backbone", "fuse", "finish_image", "finish_text"):

        def counted(*args: object, _run: object = getattr(model, name), _name: str = name, **kwargs: object) -> object:
            calls.append(_name)
            assert callable(_run)
            return _run(*args, **kwargs)

        monkeypatch.setattr(model, name, counted)
    encode(model, objectives, batch, pieces=1, recompute=False)
    assert {name: calls.count(name) for name in set(calls)} == {
        "encode_image_backbone": 2,  # clean, with hidden patches
        "encode_text_backbone": 2,  # clean, with hidden words
        "fuse": 2,
        "finish_image": 1,
        "finish_text": 1,
    }
