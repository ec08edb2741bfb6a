"""Sizes of the published models, the initialisation they were built with, and stochastic depth."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.models.multiway import MultiwayEncoder, MultiwayLayer
from tests.support.models import random_model, small_config

# Parameters per part, as counted in the official implementation.
COUNTS = {
    "m2-encoder-0.4b": {
        "text_embed.tokens": 88_507_392,
        "image_embed.proj+image_embed.cls_token": 591_360,
        "image_embed.mask_token": 768,
        "image_embed.positions": 152_832,
        "text_embed.positions": 786_432,
        "backbone:vision_expert": 63_861_504,
        "backbone:text_expert": 63_861_504,
        "vl_encoder:vision_expert": 21_288_192,
        "vl_encoder:text_expert": 21_288_192,
        "image_proj+text_proj": 1_179_648,
        "vl_image_proj+vl_text_proj": 1_179_648,
        "pooler": 590_592,
        "norm.": 1_536,
    },
    "m2-encoder-1b": {
        "backbone:vision_expert": 264_737_792,
        "vl_encoder:text_expert": 37_821_440,
        "pooler": 1_049_600,
    },
    "m2-encoder-10b": {
        "backbone:text_expert": 4_229_844_992,
        "vl_encoder:vision_expert": 604_270_592,
        "image_proj+text_proj": 8_388_608,
    },
}
TOTALS = {"m2-encoder-0.4b": 263_289_602, "m2-encoder-1b": 730_416_130, "m2-encoder-10b": 10_182_004_738}


def _meta(name: str) -> M2Encoder:
    with torch.device("meta"):
        return M2Encoder(M2EncoderConfig.from_name(name))


def _count(model: M2Encoder, part: str) -> int:
    total = 0
    for name, parameter in model.named_parameters():
        if ":" in part:
            encoder, expert = part.split(":")
            total += parameter.numel() * (name.startswith(encoder) and expert in name)
        else:
            total += parameter.numel() * name.startswith(tuple(part.split("+")))
    return total


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    model = _meta(name)
    assert {part: _count(model, part) for part in COUNTS[name]} == COUNTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]
    assert not list(model.buffers())


def test_ten_billion_parameters_build_in_seconds() -> None:
    start = time.perf_counter()
    _meta("m2-encoder-10b")
    assert time.perf_counter() - start < 5


@pytest.fixture(scope="module")
def fresh() -> M2Encoder:
    torch.manual_seed(1)
    return M2Encoder(small_config(embed_dim=128, num_heads=4, num_layers=3, num_vl_layers=2, vocab_size=2000))


def _assert_uniform(values: Tensor, bound: float) -> None:
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.95 * bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("encoder", ["backbone", "vl_encoder"])
@pytest.mark.parametrize("expert", ["vision_expert", "text_expert"])
def test_linear_layers(fresh: M2Encoder, encoder: str, expert: str) -> None:
    stack: MultiwayEncoder = getattr(fresh, encoder)
    gain = math.sqrt(math.log(2 * len(stack.layers)))
    for layer in stack.layers:
        for name, linear in layer.get_submodule(expert).named_children():
            if not isinstance(linear, nn.Linear):
                continue
            bound = 1 / math.sqrt(linear.in_features)
            scaled = bound * (gain if name in ("v_proj", "out_proj", "fc1", "fc2") else 1)
            _assert_uniform(linear.weight.detach(), scaled)
            assert linear.bias.abs().max() <= scaled
            assert linear.bias.abs().max() > 0.8 * scaled


def test_other_parameters(fresh: M2Encoder) -> None:
    for module in fresh.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert fresh.text_embed.tokens.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert fresh.text_embed.positions.weight.std().item() == pytest.approx(1, rel=0.1)
    assert fresh.image_embed.positions.weight.std().item() == pytest.approx(1, rel=0.1)
    assert (fresh.image_embed.cls_token == 0).all()
    assert (fresh.image_embed.mask_token == 0).all()
    for head in (fresh.pooler, fresh.image_proj, fresh.text_proj, fresh.vl_image_proj, fresh.vl_text_proj):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (fresh.pooler.bias == 0).all()
    assert fresh.logit_scale.item() == fresh.logit_vl_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_experts_are_drawn_independently(fresh: M2Encoder) -> None:
    layer = fresh.backbone.layers[0]
    assert (layer.vision_expert.fc1.weight != layer.text_expert.fc1.weight).any()


def test_seed_decides_everything() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(M2Encoder(small_config()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ------------------------------------------------------------------------------------------- stochastic depth


def test_schedule_is_linear_in_each_encoder() -> None:
    model = M2Encoder(small_config(num_layers=5, num_vl_layers=3, drop_path_rate=0.4))
    assert [layer.drop_path for layer in model.backbone.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [layer.drop_path for layer in model.vl_encoder.layers] == pytest.approx([0, 0.2, 0.4])


def test_one_layer_alone_drops_nothing() -> None:
    model = M2Encoder(small_config(num_vl_layers=1, drop_path_rate=0.4))
    assert [layer.drop_path for layer in model.vl_encoder.layers] == [0]


def test_identity_in_eval_mode_and_at_rate_zero() -> None:
    for rate, training in ((0.5, False), (0.0, True)):
        model = random_model(small_config(drop_path_rate=rate)).train(training)
        images = torch.rand(2, 3, 16, 16)
        torch.manual_seed(0)
        first = model.encode_image(images)
        assert torch.equal(model.encode_image(images), first)


@torch.no_grad()
def test_each_sample_drops_each_branch_on_its_own() -> None:
    """At rate p, a sample gets one of four outcomes, with the right odds and the right rescaling."""
    p, keep, samples = 0.25, 0.75, 4000
    layer: MultiwayLayer = random_model(small_config()).backbone.layers[0]
    layer.drop_path = p
    expert = layer.vision_expert
    x = torch.randn(1, 5, 16)
    q, k, v = expert.project(x, num_queries=5)
    attended = nn.functional.scaled_dot_product_attention(q, k, v)
    branch = expert.attention_output(attended)
    outcomes = {}
    for with_attention in (False, True):
        middle = x + branch / keep if with_attention else x
        for with_ffn in (False, True):
            ffn = expert.feed_forward(middle) / keep if with_ffn else 0
            outcomes[with_attention, with_ffn] = middle + ffn

    out = layer.train()(x.expand(samples, -1, -1), num_image_tokens=5)
    found: Counter[tuple[bool, bool]] = Counter()
    for sample in out:
        matches = [key for key, value in outcomes.items() if torch.allclose(sample, value[0], atol=1e-4)]
        assert len(matches) == 1
        found[matches[0]] += 1
    for (attention, ffn), number in found.items():
        expected = (keep if attention else p) * (keep if ffn else p) * samples
        assert number == pytest.approx(expected, abs=5 * math.sqrt(expected))
    assert len(found) == 4


def test_expectation_of_a_branch_is_kept() -> None:
    layer: MultiwayLayer = random_model(small_config()).backbone.layers[0]
    layer.drop_path = 0.5
    branch = torch.ones(20_000, 1, 1)
    dropped = layer.train()._drop(branch, None)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
