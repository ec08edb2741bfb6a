"""Small models with every parameter random, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_encoder import PlainEncoder
from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.types import TextTokens


def small_config(**overrides: Any) -> M2EncoderConfig:
    """A model of a few thousand parameters."""
    values: dict[str, Any] = {
        "name": "small",
        "embed_dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "num_vl_layers": 2,
        "feature_dim": 12,
        "image_size": 16,
        "patch_size": 4,
        "vocab_size": 40,
        "context_length": 14,
        "num_text_positions": 20,
    }
    return M2EncoderConfig(**{**values, **overrides})


def random_model(config: M2EncoderConfig, *, dtype: torch.dtype = torch.float32) -> M2Encoder:
    """A model in eval mode where nothing is 0 or 1 by initialisation, norms and biases included."""
    model = M2Encoder(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        model.logit_scale.fill_(2.0)
        model.logit_vl_scale.fill_(3.0)
    return model.eval()


def plain_of(model: M2Encoder) -> PlainEncoder:
    """The yardstick on the same parameters."""
    weights = {name: value.detach() for name, value in to_official_state(model.state_dict()).items()}
    return PlainEncoder(weights, num_heads=model.config.num_heads, eps=model.config.layer_norm_eps)


def random_images(config: M2EncoderConfig, number: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, S, S) in 0..1."""
    return torch.rand(number, 3, config.image_size, config.image_size, dtype=dtype)


def random_text(config: M2EncoderConfig, lengths: list[int], *, padded_to: int | None = None) -> TextTokens:
    """Random ids of given lengths; padding holds random ids, too, which must not matter."""
    width = padded_to or max(lengths)
    ids = torch.randint(0, config.vocab_size, (len(lengths), width))
    return TextTokens(ids, torch.arange(width) < torch.tensor(lengths)[:, None])
