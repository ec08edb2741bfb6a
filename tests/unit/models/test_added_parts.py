"""Prompts, adapters and mixtures in the architecture, against plain formulas; a plain model is described as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.exported import config_text
from m2_encoder.checkpoints.io import save_official
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.models.parallelize import checkpoint_layers, compile_layers
from tests.support.added_parts import (
    MIXTURE_FIELDS,
    PlainAdaptedEncoder,
    adapted_config,
    random_adapted_model,
    without_parts,
)
from tests.support.models import random_images, random_text, small_config
from tests.support.training import make_tokenizer

NO_MIXTURES = dict.fromkeys(MIXTURE_FIELDS, 0)
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "prompts": {"adapter_width": 0, "prompt_layers": 2, **NO_MIXTURES},
    "adapters": {"num_prompts": 0, "prompt_layers": 0, **NO_MIXTURES},
    "mixtures": {"num_prompts": 0, "prompt_layers": 0, "adapter_width": 0},
}
close = torch.testing.assert_close


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> M2Encoder:
    torch.manual_seed(0)
    return random_adapted_model(adapted_config(**KINDS[request.param]), dtype=torch.float64)


@torch.no_grad()
def test_images_and_texts(model: M2Encoder) -> None:
    plain = PlainAdaptedEncoder(model)
    images, text = random_images(model.config, 3, dtype=torch.float64), random_text(model.config, [9, 3, 1, 6])
    close(model.encode_image(images), plain.image(images).cls_vlffn_feats)
    close(model.forward_image(images).hidden, plain.image(images).vl)
    expected = plain.text(*text)
    close(model.encode_text(text), expected.cls_vlffn_feats)
    close(model.encode_text_heads(text).backbone_features, expected.cls_feats)
    close(model.forward_text(text).hidden[text.mask], expected.vl[text.mask])
    if model.config.adapter_width:
        assert {*plain.is_chinese} == {True, False}
    assert (model.encode_text(text) - without_parts(model).encode_text(text)).abs().max() > 1e-3


@torch.no_grad()
def test_padded_unpadded_and_single_texts_are_equal(model: M2Encoder) -> None:
    text = random_text(model.config, [9, 3, 1, 6], padded_to=12)
    together = model.encode_text(text)
    close(model.forward_text(text).features, together)
    for row, (ids, mask) in enumerate(zip(*text, strict=True)):
        close(model.encode_text(ids[None, mask])[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("text_expert", [False, True])
def test_fused_sequences_and_masks(model: M2Encoder, text_expert: bool) -> None:
    plain = PlainAdaptedEncoder(model)
    images, text = random_images(model.config, 4, dtype=torch.float64), random_text(model.config, [7, 4])
    length = model.config.num_image_tokens + 7
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    found = model.forward_fusion(images, text, attention_mask=causal, vl_text_expert=text_expert)
    backbone, vl = plain.fusion(images, *text, blocked=~causal, vl_text_expert=text_expert)
    close(found.backbone_hidden[found.mask], backbone[found.mask])
    close(found.hidden[found.mask], vl[found.mask])
    alone = causal[:7, :7]
    expected = plain.text(*text, blocked=~alone).backbone
    close(model.encode_text_backbone(text, attention_mask=alone)[text.mask], expected[text.mask])


@torch.no_grad()
def test_pairs_are_read_as_whole_sequences_are(model: M2Encoder) -> None:
    images, text = random_images(model.config, 2, dtype=torch.float64), random_text(model.config, [7, 4])
    image_hidden, text_hidden = model.encode_image_backbone(images), model.encode_text_backbone(text)
    read = model.fuse(image_hidden, text_hidden, text.mask, selected=text.mask)
    joined = torch.cat([image_hidden, text_hidden], dim=1)
    mask = torch.cat([torch.ones(image_hidden.shape[:2], dtype=torch.bool), text.mask], dim=1)
    whole = model.vl_encoder(joined, num_image_tokens=joined.shape[1], token_mask=mask)[:, image_hidden.shape[1] :]
    close(read, whole[text.mask])


def test_checkpointed_layers_have_the_same_gradients(model: M2Encoder) -> None:
    images, text = random_images(model.config, 2, dtype=torch.float64), random_text(model.config, [7, 4])
    found = []
    for prepare in (lambda _: None, checkpoint_layers):
        prepare(model.train())
        (model.encode_image(images) * model.encode_text(text)).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    added = [name for name in found[0] if any(part in name for part in ("prompts", "adapters", "mixture"))]
    assert added
    assert all(found[0][name].abs().max() > 0 for name in added if "copies" not in name)
    every = {name for name, _ in model.named_parameters() if "copies" in name}
    assert every <= found[0].keys(), "those that no token passes have a gradient of 0"
    close(found[0], found[1])


@pytest.mark.parametrize("kind", list(KINDS))
def test_memory_from_nothing_and_exports(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = adapted_config(vocab_size=tokenizer.vocab_size, num_text_positions=26, **KINDS[kind])
    with torch.device("meta"):
        empty = M2Encoder(config)
    empty.to_empty(device="cpu").init_weights()
    assert all(value.isfinite().all() for value in empty.parameters())
    text = random_text(config, [7, 4])
    if kind == "adapters":
        assert empty.text_embed.han_pieces.abs().max() == 0
    if kind in ("adapters", "mixtures"):
        close(empty.eval().encode_text(text), without_parts(empty).encode_text(text), atol=1e-6, rtol=0)

    model = random_adapted_model(config)
    export_model(tmp_path / "out", model=model, tokenizer=tokenizer)
    loaded = load(tmp_path / "out").model
    assert loaded.config == config
    assert loaded.encode_text(text).equal(model.encode_text(text))
    half = load(tmp_path / "out", dtype=torch.bfloat16).model
    assert half.encode_text(text).isfinite().all()
    with pytest.raises(CheckpointError, match="official format has no prompts or adapters, and no mixtures"):
        save_official(model, tmp_path / "official.pt")


PLAIN_TEXT = (
    '{"context_length": 14, "drop_path_rate": 0.0, "embed_dim": 16, "feature_dim": 12, "ffn_ratio": 4, "image_size": '
    '16, "initial_temperature": 0.07, "layer_norm_eps": 1e-05, "name": "small", "num_heads": 2, "num_layers": 2, '
    '"num_text_positions": 20, "num_vl_layers": 2, "patch_size": 4, "position_init_std": 1.0, "vocab_size": 40}'
)


def test_a_plain_model_is_described_as_before_there_were_parts() -> None:
    assert config_text(small_config()) == PLAIN_TEXT, "exports from before stay readable, and new ones by old versions"
    assert M2EncoderConfig.from_dict(json.loads(PLAIN_TEXT)) == small_config()
    assert {"num_prompts", "prompt_layers", "adapter_width", *MIXTURE_FIELDS} <= adapted_config().to_dict().keys()
    assert M2EncoderConfig.from_dict(adapted_config().to_dict()) == adapted_config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prompts": 2}, r"num_prompts=2: and prompt_layers=0 must both be 0, or both above 0"),
        ({"prompt_layers": 1}, r"num_prompts=0: and prompt_layers=1 must both"),
        ({"num_prompts": 2, "prompt_layers": 3}, r"prompt_layers=3: must not exceed num_layers=2"),
        ({"adapter_width": -1}, r"adapter_width=-1: must be"),
        ({"mixture_top_k": 2}, r"mixture_top_k=2: needs mixture_copies above 1"),
        ({"mixture_copies": 1, "mixture_text_layers": 1}, r"mixture_copies=1: must be 0, or 2 and more"),
        ({"mixture_copies": 3, "mixture_text_layers": 1}, r"mixture_top_k=0: must be in 2\.\.3"),
        ({"mixture_copies": 3, "mixture_top_k": 2}, r"mixture_copies=3: needs mixture_vision_layers or"),
        (
            {"mixture_copies": 3, "mixture_top_k": 2, "mixture_text_layers": 3},
            r"mixture_text_layers=3: must not exceed num_layers=2",
        ),
    ],
)
def test_impossible_parts(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_config(**values)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_layers_compute_the_same() -> None:
    model = random_adapted_model(adapted_config(), dtype=torch.float64)
    images, text = random_images(model.config, 2, dtype=torch.float64), random_text(model.config, [7, 4])
    before = model.encode_image(images), model.encode_text(text)
    compile_layers(model)
    close((model.encode_image(images), model.encode_text(text)), before)
