"""The encoder equals the plain formulas, in fp64, for any shape, length and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder import M2EncoderConfig
from tests.support.models import plain_of, random_images, random_model, random_text, small_config

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


@st.composite
def configs(draw: st.DrawFn) -> M2EncoderConfig:
    num_heads = draw(st.sampled_from([1, 2, 3]))
    patch_size = draw(st.sampled_from([2, 4]))
    return small_config(
        num_heads=num_heads,
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        num_layers=draw(st.integers(1, 3)),
        num_vl_layers=draw(st.integers(1, 2)),
        feature_dim=draw(st.sampled_from([5, 12])),
        patch_size=patch_size,
        image_size=patch_size * draw(st.integers(1, 4)),
        ffn_ratio=draw(st.sampled_from([2, 4])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
    )


class Case:
    """A model, its yardstick and a batch, all in fp64."""

    def __init__(self, config: M2EncoderConfig, lengths: list[int], padding: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = random_model(config, dtype=torch.float64)
        self.plain = plain_of(self.model)
        self.images = random_images(config, len(lengths), dtype=torch.float64)
        self.text = random_text(config, lengths, padded_to=max(lengths) + padding)
        self.longest = max(lengths)
        self.valid = self.text.mask[:, : self.longest]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=4))
    return Case(draw(configs()), lengths, draw(st.integers(0, 4)), draw(st.integers(0, 2**16)))


def close(ours: Any, plain: Any) -> None:
    torch.testing.assert_close(ours, plain, **TOLERANCE)


@settings(max_examples=25)
@given(cases())
@torch.no_grad()
def test_image(case: Case) -> None:
    expected = case.plain.image(case.images)
    out = case.model.forward_image(case.images)
    close(out.backbone_hidden, expected.backbone)
    close(out.hidden, expected.vl)
    close(out.backbone_features, expected.cls_feats)
    close(out.features, expected.cls_vlffn_feats)
    close(case.model.encode_image(case.images), expected.cls_vlffn_feats)


@settings(max_examples=25)
@given(cases())
@torch.no_grad()
def test_text(case: Case) -> None:
    expected = case.plain.text(*case.text)
    out = case.model.forward_text(case.text)
    assert out.hidden.shape[1] == case.longest, "padding is trimmed to the longest text"
    close(out.backbone_hidden[case.valid], expected.backbone[:, : case.longest][case.valid])
    close(out.hidden[case.valid], expected.vl[:, : case.longest][case.valid])
    close(out.backbone_features, expected.cls_feats)
    close(out.features, expected.cls_vlffn_feats)
    close(case.model.encode_text(case.text), expected.cls_vlffn_feats)


@settings(max_examples=25)
@given(cases(), st.booleans())
@torch.no_grad()
def test_fusion(case: Case, text_expert: bool) -> None:
    backbone, joint = case.plain.fusion(case.images, *case.text, vl_text_expert=text_expert)
    out = case.model.forward_fusion(case.images, case.text, vl_text_expert=text_expert)
    length = out.mask.shape[1]
    assert out.num_image_tokens == case.model.config.num_image_tokens
    assert torch.equal(out.mask[:, out.num_image_tokens :], case.valid)
    assert out.mask[:, : out.num_image_tokens].all()
    close(out.backbone_hidden[out.mask], backbone[:, :length][out.mask])
    close(out.hidden[out.mask], joint[:, :length][out.mask])


@settings(max_examples=15)
@given(cases(), st.booleans())
@torch.no_grad()
def test_attention_masks(case: Case, per_sample: bool) -> None:
    """Any mask that lets a token see itself; ours says what is allowed, the official one what is blocked."""
    width = case.text.ids.shape[1]
    shape = (len(case.text.ids), width, width) if per_sample else (width, width)
    allowed = (torch.rand(shape) < 0.5) | torch.eye(width, dtype=torch.bool)
    expected = case.plain.text(*case.text, blocked=~allowed)
    out = case.model.forward_text(case.text, attention_mask=allowed)
    close(out.backbone_hidden[case.valid], expected.backbone[:, : case.longest][case.valid])
    close(out.hidden[case.valid], expected.vl[:, : case.longest][case.valid])


@settings(max_examples=15)
@given(cases())
@torch.no_grad()
def test_fusion_with_a_caption_mask_and_masked_patches(case: Case) -> None:
    num_image, width = case.model.config.num_image_tokens, case.text.ids.shape[1]
    allowed = torch.ones(num_image + width, num_image + width).tril().bool()
    allowed[:num_image, :num_image] = True
    patch_mask = torch.rand(len(case.images), num_image - 1) < 0.5
    out = case.model.forward_fusion(case.images, case.text, attention_mask=allowed, patch_mask=patch_mask)

    plain = case.plain
    image = plain.embed_image(case.images, patch_mask)
    padding = torch.cat([torch.zeros(image.shape[:2], dtype=torch.bool), ~case.text.mask], dim=1)
    is_image = torch.arange(num_image + width) < num_image
    joined = torch.cat([image, plain.embed_text(case.text.ids)], dim=1)
    expected = plain.encode("backbone.encoder", joined, is_image, padding, ~allowed)
    close(out.backbone_hidden[out.mask], expected[:, : out.mask.shape[1]][out.mask])


@torch.no_grad()
def test_masked_patches_alone() -> None:
    case = Case(small_config(), [3, 2], 0, 0)
    patch_mask = torch.rand(2, 16) < 0.5
    out = case.model.forward_image(case.images, patch_mask=patch_mask)
    close(out.hidden, case.plain.image(case.images, patch_mask).vl)
    close(case.model.forward_image(case.images, patch_mask=patch_mask.to(torch.uint8)).hidden, out.hidden)


@pytest.mark.parametrize("images_per_text", [1, 2, 4])
@torch.no_grad()
def test_fusion_repeats_each_text_in_a_row(images_per_text: int) -> None:
    case = Case(small_config(), [7, 3], 1, 0)
    images = random_images(case.model.config, 2 * images_per_text, dtype=torch.float64)
    expected, _ = case.plain.fusion(images, *case.text)
    out = case.model.forward_fusion(images, case.text)
    close(out.backbone_hidden[out.mask], expected[:, : out.mask.shape[1]][out.mask])


@torch.no_grad()
def test_similarity_uses_the_first_scale() -> None:
    case = Case(small_config(), [3, 5, 4], 0, 0)
    image, text = case.model.encode_image(case.images), case.model.encode_text(case.text)
    close(
        case.model.similarity(image, text),
        torch.exp(torch.tensor(2.0, dtype=torch.float64)) * image @ text.t(),
    )
    half = case.model.similarity(image[:2].bfloat16(), text.bfloat16())
    assert half.dtype == torch.float32
    assert half.shape == (2, 3)
