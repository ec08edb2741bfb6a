"""Costs of one image-text pair in an M2-Encoder: parameters, operations, bytes kept for backward.

Parameters are counted on the real model, built without memory; operations and activations are formulas, which tests
hold against the real model. A pass encodes images and texts to the feature of token 0, as training does.

Letters: N tokens of an image or a text · D width · E feature dim · f feed-forward ratio · P patch side · S image side ·
H heads.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import MultiwayLayer
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS

PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")
"""Precisions of training that the formulas know, as Lightning names them."""
_LOGIT_HEADS = {1: (), 2: ("backbone_features",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Costs of a model; operations and bytes are of one pair, that is one image and one text."""

    name: str  # of the model
    parameters: int  # all of them, also those that training freezes
    trainable_parameters: int  # those with a gradient
    layer_parameters: int  # of the largest layer, both experts
    root_parameters: int  # outside of the layers: embeddings, heads, norms
    num_layers: int  # multiway layers, backbone and vision-language encoder
    feature_dim: int  # E
    heads: int  # contrastive heads h
    forward_flops: int  # multiplications and additions of a forward pass
    backward_flops: int  # of the backward pass: twice that, without the gradient of the pixels
    activation_bytes: int  # kept for backward
    layer_activation_bytes: int  # kept by one full layer, of the larger modality
    layer_input_bytes: int  # inputs of all layers, which activation checkpointing keeps instead
    work_bytes: int  # the two widest gradients of a backward pass, alive beside the activations
    batch_bytes: int  # pixels, in 8 bits, and token ids
    autocast_bytes_per_parameter: int  # copies of the weights that mixed precision keeps during a pass


def estimate_cost(
    config: M2EncoderConfig, *, precision: str = "bf16-mixed", text_tokens: int | None = None, heads: int = 1
) -> ModelCost:
    """Costs of an architecture.

    Args:
        config: the architecture.
        precision: one of `PRECISIONS`.
        text_tokens: mean tokens of a text (padding costs nothing); None: the context length, the most there can be.
        heads: contrastive heads: 1 for the features of the vision-language encoder, 2 for those of the backbone, too.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision} must be one of {', '.join(PRECISIONS)}")
    tokens = config.context_length if text_tokens is None else text_tokens
    if not 2 <= tokens <= config.context_length:
        raise UserError(f"text_tokens={tokens} must be in 2..{config.context_length}, the context length of the model")
    if heads not in _LOGIT_HEADS:
        raise UserError(f"heads={heads} must be 1 or 2")
    mixed = precision != "32-true"
    counts = _count_parameters(config, heads)
    patch_flops = 2 * 3 * config.patch_size**2 * config.embed_dim * config.grid_size**2
    head_flops = heads * 2 * 2 * config.embed_dim * config.feature_dim
    layer_flops = _layers_flops(config, config.num_image_tokens) + _layers_flops(config, tokens)
    widest = max(config.num_image_tokens, tokens)
    return ModelCost(
        name=config.name,
        parameters=counts["all"],
        trainable_parameters=counts["trainable"],
        layer_parameters=counts["layer"],
        root_parameters=counts["root"],
        num_layers=config.num_layers + config.num_vl_layers,
        feature_dim=config.feature_dim,
        heads=heads,
        forward_flops=patch_flops + layer_flops + head_flops,
        backward_flops=patch_flops + 2 * (layer_flops + head_flops),
        activation_bytes=_tower_bytes(config, config.num_image_tokens, mixed=mixed)
        + _tower_bytes(config, tokens, mixed=mixed)
        + (2 if mixed else 4) * 3 * config.image_size**2,  # the patch projection keeps the normalised pixels
        layer_activation_bytes=_layer_bytes(config, widest, mixed=mixed),
        layer_input_bytes=4
        * (config.num_image_tokens + tokens)
        * config.embed_dim
        * (config.num_layers + config.num_vl_layers),
        work_bytes=2 * 4 * config.ffn_ratio * config.embed_dim * widest,
        batch_bytes=3 * config.image_size**2 + 8 * config.context_length,
        autocast_bytes_per_parameter=2 if mixed else 0,
    )


@functools.lru_cache(maxsize=32)
def _count_parameters(config: M2EncoderConfig, heads: int) -> dict[str, int]:
    """Counts on the real model, of which no parameter takes memory."""
    with torch.device("meta"):
        model = M2Encoder(config)
    model.freeze_parts(OPTIONAL_PARTS.keys() - _LOGIT_HEADS[heads])
    layers = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if isinstance(module, MultiwayLayer)
    ]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return {
        "all": everything,
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "layer": max(layers),
        "root": everything - sum(layers),
    }


def _layers_flops(config: M2EncoderConfig, tokens: int) -> int:
    """Operations of all layers; the last one computes token 0 alone, for which it needs the keys and values of all."""
    width = config.embed_dim
    matrices = 2 * width**2 * (4 + 2 * config.ffn_ratio)  # q, k, v, output and the feed-forward network, of one token
    full = tokens * matrices + 2 * 2 * tokens**2 * width
    last = tokens * 2 * 2 * width**2 + (matrices - 2 * 2 * width**2) + 2 * 2 * tokens * width
    return (config.num_layers + config.num_vl_layers - 1) * full + last


def _layer_bytes(config: M2EncoderConfig, tokens: int, *, mixed: bool) -> int:
    """Bytes that one full layer keeps for backward.

    In fp32: input, its norm, q, k, v, attention, its norm, the second residual and its norm, each (N, D); the first
    matrix's output, its activation and the norm of that, each (N, fD). Autocast runs norms in fp32, so it keeps their
    inputs in 4 bytes and a copy of their outputs in 2, once per matrix that reads it: three for q, k and v.
    """
    wide = config.ffn_ratio
    per_token = (30 + 8 * wide) if mixed else 4 * (9 + 3 * wide)
    statistics = 4 * config.num_heads + 4 * 2 * 4  # logsumexp of the attention; mean and deviation of four norms
    return tokens * (per_token * config.embed_dim + statistics)


def _tower_bytes(config: M2EncoderConfig, tokens: int, *, mixed: bool) -> int:
    """Bytes that one modality keeps for backward, without its embedding."""
    num_full = config.num_layers + config.num_vl_layers - 1
    final_norm = 4 * tokens * config.embed_dim
    # The last layer keeps its input, the norm of it, keys and values of all tokens; the rest of it is one token wide.
    last = (12 if mixed else 16) * tokens * config.embed_dim + _layer_bytes(config, 1, mixed=mixed)
    return num_full * _layer_bytes(config, tokens, mixed=mixed) + final_norm + last
