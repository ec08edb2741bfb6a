"""Captioning against the plain encoder, caption by caption, and its mask against the released code's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from benchmarks.plain_encoder import PlainEncoder
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.objectives import Bench, build_bench, make_batch


def plain_terms(module: Bench, batch: ImageTextBatch) -> tuple[list[Tensor], int]:
    """Losses of each caption's tokens, alone, without padding; and how many targets scored highest."""
    objective = module.objectives["captioning"]
    assert isinstance(objective, Captioning)
    head, weights = objective.head, to_official_state(dict(module.model.named_parameters()))
    plain = PlainEncoder(weights, num_heads=module.config.num_heads)
    losses, hits = [], 0
    for row in range(len(batch.text.ids)):
        length, own = int(batch.text.mask[row].sum()), row // batch.captions_per_image
        image = plain.image(batch.images[own : own + 1]).backbone
        ids, patches = batch.text.ids[row : row + 1, :length], image.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        text = plain.text(ids, torch.ones_like(ids), future).backbone
        blocked = torch.zeros(patches + length, patches + length, dtype=torch.bool)
        blocked[:patches, patches:] = True
        blocked[patches:, patches:] = future
        everything = torch.ones(patches + length, dtype=torch.bool)
        both = torch.cat([image, text], dim=1)
        hidden = plain.encode("backbone_vl", both, everything, torch.zeros(both.shape[:2], dtype=torch.bool), blocked)
        states = functional.gelu(hidden[0, patches:-1] @ head.transform.weight.t() + head.transform.bias)
        states = functional.layer_norm(states, states.shape[-1:], head.norm.weight, head.norm.bias)
        logits = states @ weights["backbone.text_embed.weight"].t() + head.bias
        losses.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        hits += int((logits.argmax(dim=1) == ids[0, 1:]).sum())
    return losses, hits


@pytest.mark.parametrize(("pieces", "recompute"), [(1, True), (2, False), (4, True)])
def test_loss_and_gradients_are_those_of_the_plain_encoder(pieces: int, recompute: bool) -> None:
    module = build_bench({"captioning": Captioning()}, micro_batches=pieces, recompute=recompute)
    batch = make_batch(4, 2)
    output = module.evaluate(batch)["captioning"]
    losses, hits = plain_terms(module, batch)
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(output.per_sample, torch.stack([x.mean() for x in losses]).detach(), rtol=1e-9, atol=0)
    assert output.counts is not None
    assert output.counts.tolist() == (batch.text.mask.sum(dim=1) - 1).tolist()
    assert round(float((output.scores["accuracy"] * output.counts).sum())) == hits
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(output.loss, list(trained.values()))
    theirs = torch.autograd.grad(torch.cat(losses).mean(), list(trained.values()))
    for name, own, wanted in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert not any(name.startswith("model.vl_image_proj") for name in trained), "no objective trains features"


def test_no_token_sees_what_comes_after_it() -> None:
    module = build_bench({"captioning": Captioning()})
    batch = make_batch(2, 1)
    allowed = frozenset({"caption"})
    other = batch.text.ids.clone()
    other[:, 4] = (other[:, 4] + 1) % module.config.vocab_size
    hidden = [
        PiecePasses(module.model, batch._replace(text=text), allowed=allowed).caption.unflatten(0, (2, -1))
        for text in (TextTokens(batch.text.ids, batch.text.mask | True), TextTokens(other, batch.text.mask | True))
    ]
    torch.testing.assert_close(hidden[0][:, :4], hidden[1][:, :4], rtol=0, atol=1e-12)
    assert (hidden[0][:, 4:] - hidden[1][:, 4:]).abs().amin(dim=(0, 2)).min() > 1e-9


@pytest.mark.parametrize("name", ["tiny_base", "tiny_large"])
def test_the_mask_is_the_released_one(parity_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = load_file(parity_dir / name / "inputs.safetensors")
    config = M2EncoderConfig.from_official(parity_dir / name / "config.json")
    text = TextTokens(inputs["text_ids"][:4], torch.ones_like(inputs["text_masks"][:4], dtype=torch.bool))
    batch = make_batch(4, 1)._replace(images=inputs["image"], text=text)
    masks: dict[str, Tensor] = {}
    for method in ("encode_text_backbone", "fuse"):

        def spied(
            *args: object, _run: object = getattr(M2Encoder, method), _name: str = method, **kwargs: object
        ) -> object:
            mask = kwargs["attention_mask"]
            assert isinstance(mask, Tensor)
            assert callable(_run)
            masks[_name] = mask
            return _run(*args, **kwargs)

        monkeypatch.setattr(M2Encoder, method, spied)
    _ = PiecePasses(M2Encoder(config), batch, allowed=frozenset({"caption"})).caption
    assert torch.equal(masks["fuse"], inputs["fusion_caption_mask.attn_mask"] == 0)
    assert torch.equal(masks["encode_text_backbone"], inputs["text_causal.attn_mask"] == 0)


def test_unknown_decoders_are_refused() -> None:
    with pytest.raises(UserError, match="decoder=shared: must be one of tied, own"):
        Captioning(decoder="shared")  # type: ignore[arg-type]
