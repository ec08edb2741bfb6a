"""Masked images: attentive masks and visual codes against plain formulas, in pieces, recomputed or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.patch_targets import (
    NormalizedPixels,
    VisualCodes,
    join_patches,
    normalized_patches,
    split_patches,
)
from m2_encoder.types import ImageTextBatch
from tests.support.objectives import CONFIG, Bench, build_bench, make_batch, take_numbers

ROWS, CAPTIONS, PATCHES, HIDDEN, CODES = 4, 2, 16, 6, 11


class Brightness:
    """A tokenizer that sorts patches by their mean."""

    num_codes, image_size, patch_size = CODES, CONFIG.image_size, CONFIG.patch_size

    def encode(self, images: Tensor) -> Tensor:
        return (split_patches(images, self.patch_size).mean(dim=-1) * 40).long() % CODES

    def decode(self, codes: Tensor) -> Tensor:
        patches = (codes / CODES)[..., None].expand(*codes.shape, 3 * self.patch_size**2)
        return join_patches(patches, self.patch_size)

    def to(self, device: Any) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return self


def make_targets(kind: str) -> NormalizedPixels | VisualCodes:
    if kind == "pixels":
        return NormalizedPixels()
    targets = VisualCodes(tokenizer="somewhere")
    targets.read_with(Brightness())
    return targets


def make_bench(kind: str, masking: Any, **topology: Any) -> Bench:
    cmim = MaskedImage(masking=masking, mask_ratio=HIDDEN / PATCHES, targets=make_targets(kind))
    return build_bench({"itc": ImageTextContrastive(), "cmim": cmim}, **topology)


def batch_of(masking: str) -> ImageTextBatch:
    batch = make_batch(ROWS, CAPTIONS)
    mask = torch.rand((ROWS, PATCHES), generator=torch.Generator().manual_seed(4)) < 0.4
    return batch._replace(patch_mask=mask if masking == "block" else None)


def plain_mask(model: M2Encoder, batch: ImageTextBatch, row: int) -> Tensor:
    """The most similar patches, one by one."""
    hidden = model.forward_image(batch.images[row : row + 1]).hidden[0, 1:]
    texts = range(CAPTIONS * row, CAPTIONS * (row + 1))
    caption = torch.stack([model.encode_text(batch.text.ids[t : t + 1], batch.text.mask[t : t + 1])[0] for t in texts])
    scores = functional.cosine_similarity(model.vl_image_proj(hidden), caption.mean(dim=0)[None], dim=1)
    mask = torch.zeros((1, PATCHES), dtype=torch.bool)
    for _ in range(HIDDEN):
        best = max((p for p in range(PATCHES) if not mask[0, p]), key=scores.tolist().__getitem__)
        mask[0, best] = True
    return mask


def plain_loss(module: Bench, batch: ImageTextBatch, kind: str) -> tuple[Tensor, float]:
    """Caption by caption, patch by patch; also the share of right codes."""
    model, cmim = module.model, module.objectives["cmim"]
    assert isinstance(cmim, MaskedImage)
    losses, hits = [], []
    for text in range(ROWS * CAPTIONS):
        row, length = text // CAPTIONS, int(batch.text.mask[text].sum())
        image = batch.images[row : row + 1]
        mask = plain_mask(model, batch, row) if batch.patch_mask is None else batch.patch_mask[row : row + 1]
        parts = [
            model.backbone(model.image_embed(image, patch_mask=mask), num_image_tokens=PATCHES + 1),
            model.backbone(model.text_embed(batch.text.ids[text : text + 1, :length]), num_image_tokens=0),
        ]
        states = model.vl_encoder(torch.cat(parts, dim=1), num_image_tokens=PATCHES + 1 + length)[0, 1:]
        for patch in mask[0].nonzero()[:, 0].tolist():
            answer = cmim.targets.head(states[patch])
            if kind == "pixels":
                losses.append((answer - normalized_patches(image, CONFIG.patch_size)[0, patch]).square().mean())
            else:
                code = Brightness().encode(image)[0, patch]
                losses.append(-torch.log_softmax(answer, dim=0)[code])
                hits.append(float(answer.argmax() == code))
    return torch.stack(losses).mean(), sum(hits) / max(1, len(hits))


@pytest.mark.parametrize(("pieces", "recompute"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize(("kind", "masking"), [("pixels", "attentive"), ("codes", "block"), ("codes", "attentive")])
def test_loss_and_gradients_are_those_of_plain_formulas(kind: str, masking: str, pieces: int, recompute: bool) -> None:
    module = make_bench(kind, masking, micro_batches=pieces, recompute=recompute)
    batch = batch_of(masking)
    found = take_numbers(module, batch)
    plain = make_bench(kind, masking)
    expected, accuracy = plain_loss(plain, batch, kind)
    itc = plain.evaluate(batch)["itc"].loss
    (itc + expected).backward()
    torch.testing.assert_close(torch.tensor(found["loss/cmim"]), expected.detach(), rtol=1e-10, atol=0)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == found.keys() - {"loss/itc", "loss/cmim"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.tensor(found[name]), gradient, rtol=1e-7, atol=1e-12)
    output = module.evaluate(batch)["cmim"]
    assert output.scores.keys() == ({"accuracy"} if kind == "codes" else set())
    if kind == "codes":
        assert output.counts is not None
        hits = float((output.scores["accuracy"] * output.counts).sum())
        assert hits / float(output.counts.sum()) == pytest.approx(accuracy)


def test_attentive_masks_need_no_masks_of_the_loader_and_follow_the_captions() -> None:
    module = make_bench("pixels", "attentive")
    cmim = module.objectives["cmim"]
    assert isinstance(cmim, MaskedImage)
    assert cmim.patch_ratio is None
    assert MaskedImage().patch_ratio == pytest.approx(80 / 196)
    batch = batch_of("attentive")
    first = torch.cat([plain_mask(module.model, batch, row) for row in range(ROWS)])
    turned = batch._replace(text=type(batch.text)(batch.text.ids.flip(0), batch.text.mask.flip(0)))
    other = torch.cat([plain_mask(module.model, turned, row) for row in range(ROWS)])
    assert not torch.equal(first, other)


def test_tokenizer_is_no_part_of_the_module() -> None:
    tokenizer = torch.nn.Linear(2, 2)
    targets = VisualCodes(tokenizer="somewhere")
    targets.read_with(tokenizer)  # type: ignore[arg-type]  # any module shows it
    assert not list(targets.parameters())
    assert not targets.state_dict()
    assert not any(p.requires_grad for p in tokenizer.parameters())


@pytest.mark.parametrize("kind", ["pixels", "codes"])
def test_drawings_keep_what_is_visible(kind: str) -> None:
    targets = make_targets(kind)
    targets.build(CONFIG)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mask = torch.zeros(3, PATCHES, dtype=torch.bool)
    mask[:, [0, 5]] = True
    drawn = targets.draw(torch.randn(int(mask.sum()), CONFIG.embed_dim), images, mask)
    assert drawn.shape == (3, 3, 16, 16)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    own, true = split_patches(drawn, 4), split_patches(images, 4)
    torch.testing.assert_close(own[~mask], true[~mask])
    assert bool((own[mask] != true[mask]).any(dim=1).all())
    torch.testing.assert_close(join_patches(true, 4), images / 255)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="masking=random: must be one of block, attentive"):
        MaskedImage(masking="random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="codes have no tokenizer yet; load 'somewhere'"):
        VisualCodes(tokenizer="somewhere").build(CONFIG)
    with pytest.raises(UserError, match="has image_size=16, the model 32; train one with"):
        make_targets("codes").build(dataclasses.replace(CONFIG, image_size=32))
    with pytest.raises(UserError, match=r"mask_ratio=0\.01: hides 0 of the 16 patches"):
        MaskedImage(mask_ratio=0.01, masking="attentive").build(CONFIG)
