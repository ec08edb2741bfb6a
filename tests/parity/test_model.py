"""Every tensor that the official implementation gave for two small models, inside and out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.plain_encoder import PlainEncoder
from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.io import load_model
from tests.support.recorder import attention_weights, record

# The README of the parity data gives these with what was seen: 6e-7 and 1.2e-5.
FEATURES, HIDDEN, LOGITS = 1e-5, 5e-5, 1e-4
TOLERANCES = (
    (r".*_fp64", 2e-7),  # the official softmax is fp32 even there
    (r".*\.cls_(vlffn_)?feats|similarity\.probs|.*attn_weights_heads_first", FEATURES),
    (r"similarity\.logits_.*", LOGITS),
    (r".*encoder_padding_mask|text\.text_embed", 0.0),
    (r".*", HIDDEN),
)


class Golden(NamedTuple):
    model: M2Encoder
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    ours: dict[str, Tensor]
    valid: dict[str, Tensor]


class Computed:
    """Our outputs under the names of the file, and which positions of them are tokens."""

    def __init__(self, model: M2Encoder, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self.ours: dict[str, Tensor] = {}
        self.valid: dict[str, Tensor] = {}
        self.text = (inputs["text_ids"], inputs["text_masks"])
        self.first = (inputs["text_ids"][:4], inputs["text_masks"][:4])
        with torch.no_grad():
            self.image_pass()
            self.text_pass()
            self.fusion_pass()
            self.similarity()

    def add(self, name: str, value: Tensor, valid: Tensor | None = None) -> None:
        self.ours[name] = value
        if valid is not None:
            self.valid[name] = valid

    def add_recorded(self, prefix: str, seen: dict[str, Tensor], valid: Tensor | None) -> None:
        for name, value in seen.items():
            if name not in ("layer0.q", "layer0.k"):
                self.add(f"{prefix}.{name}", value, valid)

    def image_pass(self) -> None:
        model, images = self.model, self.inputs["image"]
        with record(model.backbone) as backbone, record(model.vl_encoder) as vl:
            out = model.forward_image(images)
        self.add_recorded("image.backbone", backbone, None)
        self.add_recorded("image.backbone_vl", vl, None)
        weights = attention_weights(backbone, model.config.num_heads)
        self.add("image.backbone.layer0.attn_weights_heads_first", weights)
        self.add("image.cls_feats", out.backbone_features)
        self.add("image.cls_vlffn_feats", out.features)
        self.add("image.backbone.embedding_before_position", self.image_tokens())
        masked = model.forward_image(images, patch_mask=self.inputs["vision_masked_position"].bool())
        self.add("masked_image.backbone.out", masked.backbone_hidden)

    def image_tokens(self) -> Tensor:
        embed, images = self.model.image_embed, self.inputs["image"]
        patches = embed.proj((images - 0.5) / 0.5).flatten(2).transpose(1, 2)
        return torch.cat([embed.cls_token.expand(len(images), -1, -1), patches], dim=1)

    def text_pass(self) -> None:
        model, valid = self.model, self.inputs["text_masks"].bool()
        with record(model.backbone) as backbone, record(model.vl_encoder) as vl:
            out = model.forward_text(*self.text)
        self.add_recorded("text.backbone", backbone, valid)
        self.add_recorded("text.backbone_vl", vl, valid)
        weights = attention_weights(backbone, model.config.num_heads, valid)
        queries = valid[None, :, :].expand(weights.shape[:3])
        self.add("text.backbone.layer0.attn_weights_heads_first", weights, queries)
        self.add("text.cls_feats", out.backbone_features)
        self.add("text.cls_vlffn_feats", out.features)
        self.add("text.text_embed", model.text_embed.tokens(self.text[0]))
        self.add("text.backbone.embedding_before_position", model.text_embed.tokens(self.text[0]))
        causal = model.forward_text(*self.text, attention_mask=self.inputs["text_causal.attn_mask"] == 0)
        self.add("text_causal.backbone.out", causal.backbone_hidden, valid)

    def fusion_pass(self) -> None:
        model, images = self.model, self.inputs["image"]
        with record(model.backbone) as backbone:
            out = model.forward_fusion(images, *self.first)
        self.add_recorded("fusion.backbone", backbone, out.mask)
        tokens = torch.cat([self.image_tokens(), model.text_embed.tokens(self.first[0])], dim=1)
        self.add("fusion.backbone.embedding_before_position", tokens, out.mask)
        self.add("fusion.encoder_padding_mask", (~out.mask).long())
        self.add("fusion.backbone_vl.split_minus1.out", out.hidden, out.mask)
        with_text_expert = model.forward_fusion(images, *self.first, vl_text_expert=True)
        self.add("fusion.backbone_vl.split_at_text.out", with_text_expert.hidden, out.mask)
        repeated = model.forward_fusion(images, self.first[0][:2], self.first[1][:2])
        self.add("fusion_repeat.backbone.out", repeated.backbone_hidden, repeated.mask)
        caption = model.forward_fusion(
            images, *self.first, attention_mask=self.inputs["fusion_caption_mask.attn_mask"] == 0
        )
        self.add("fusion_caption_mask.backbone.out", caption.backbone_hidden, caption.mask)

    def similarity(self) -> None:
        model = self.model
        image, text = model.encode_image(self.inputs["image"]), model.encode_text(*self.text)
        logits = model.similarity(image, text)
        self.add("similarity.logits_per_image", logits)
        self.add("similarity.probs", logits.softmax(dim=-1))
        other = model.logit_vl_scale.exp() * image @ text.t()
        self.add("similarity.logits_per_image_vl_scale_not_used_by_upstream", other)


@pytest.fixture(scope="module", params=["tiny_base", "tiny_large"])
def golden(request: pytest.FixtureRequest, parity_dir: Path) -> Golden:
    folder = parity_dir / request.param
    config = M2EncoderConfig.from_official(folder / "config.json")
    model = load_model(config, folder / "weights.safetensors")
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    computed = Computed(model, inputs)
    precise = load_model(config, folder / "weights.safetensors", dtype=torch.float64)
    with torch.no_grad():
        images = precise.encode_image(inputs["image"].double())
        texts = precise.encode_text(inputs["text_ids"], inputs["text_masks"])
    computed.add("image.cls_vlffn_feats_fp64", images)
    computed.add("text.cls_vlffn_feats_fp64", texts)
    return Golden(model, inputs, outputs, computed.ours, computed.valid)


def _tolerance(name: str) -> float:
    return next(tolerance for pattern, tolerance in TOLERANCES if re.fullmatch(pattern, name))


def test_every_tensor(golden: Golden) -> None:
    far = []
    for name, expected in golden.outputs.items():
        ours = golden.ours[name]
        if name in golden.valid:
            # We trim padding to the longest text, and what stands at padded positions means nothing.
            valid = golden.valid[name]
            expected = expected[tuple(slice(0, length) for length in ours.shape)]
            ours, expected = ours[valid], expected[valid]
        assert ours.shape == expected.shape, name
        difference = (ours.double() - expected.double()).abs().max().item()
        if not difference <= _tolerance(name):
            far.append(f"{name}: {difference:.1e} > {_tolerance(name):.0e}")
    assert not far, far


def test_every_tensor_is_compared(golden: Golden) -> None:
    assert set(golden.outputs) <= set(golden.ours)
    assert len(golden.outputs) >= 45


def test_public_features_are_the_ones_of_the_whole_pass(golden: Golden) -> None:
    with torch.no_grad():
        images = golden.model.encode_image(golden.inputs["image"])
        texts = golden.model.encode_text(golden.inputs["text_ids"], golden.inputs["text_masks"])
    torch.testing.assert_close(images, golden.outputs["image.cls_vlffn_feats"], rtol=0, atol=FEATURES)
    torch.testing.assert_close(texts, golden.outputs["text.cls_vlffn_feats"], rtol=0, atol=FEATURES)


def test_similarity_uses_the_scale_of_the_released_model(golden: Golden) -> None:
    other = golden.outputs["similarity.logits_per_image_vl_scale_not_used_by_upstream"]
    assert (golden.ours["similarity.logits_per_image"] - other).abs().max() > 1


def test_masked_patches_matter(golden: Golden) -> None:
    masked, plain = golden.ours["masked_image.backbone.out"], golden.ours["image.backbone.out"]
    assert (masked - plain).abs().max() > 0.1


def test_yardstick_agrees_with_the_official_outputs(golden: Golden, parity_dir: Path) -> None:
    """What unit tests and benchmarks compare with in every clone is itself held to the official numbers."""
    name = {64: "tiny_base", 80: "tiny_large"}[golden.model.config.embed_dim]
    plain = PlainEncoder(load_file(parity_dir / name / "weights.safetensors"), num_heads=golden.model.config.num_heads)
    inputs, outputs = golden.inputs, golden.outputs
    image, text = plain.image(inputs["image"]), plain.text(inputs["text_ids"], inputs["text_masks"])
    fusion, joint = plain.fusion(inputs["image"], inputs["text_ids"][:4], inputs["text_masks"][:4], vl_text_expert=True)
    for ours, key, tolerance in (
        (image.vl, "image.backbone_vl.out", HIDDEN),
        (image.cls_feats, "image.cls_feats", FEATURES),
        (image.cls_vlffn_feats, "image.cls_vlffn_feats", FEATURES),
        (text.backbone, "text.backbone.out", HIDDEN),
        (text.cls_vlffn_feats, "text.cls_vlffn_feats", FEATURES),
        (fusion, "fusion.backbone.out", HIDDEN),
        (joint, "fusion.backbone_vl.split_at_text.out", HIDDEN),
    ):
        torch.testing.assert_close(ours, outputs[key], rtol=0, atol=tolerance, msg=key)
