"""Costs of one image-text pair in an M2-Encoder: parameters, operations, bytes kept for backward.

Parameters are counted on the real model, built without memory and adapted as training adapts it; operations and
activations are formulas, which tests hold against the real model. A pass encodes images and texts to the feature of
token 0, as training does.

Letters: N tokens of an image or a text · D width · E feature dim · f feed-forward ratio · P patch side · S image side ·
H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.models.config import NUM_RESERVED_POSITIONS, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import MultiwayLayer
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS

PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")
"""Precisions of training that the formulas know, as Lightning names them."""
_LOGIT_HEADS = {1: (), 2: ("backbone_features",)}
_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Costs of a model; operations and bytes are of one pair, that is one image and one text."""

    name: str  # of the model
    parameters: int  # all of them, also those that training freezes
    trainable_parameters: int  # those with a gradient
    layer_parameters: int  # of the largest layer, both experts
    root_parameters: int  # outside of the layers: embeddings, heads, norms
    trainable_layer_parameters: int  # of the layer with most of them
    trainable_root_parameters: int  # outside of the layers
    num_layers: int  # multiway layers, backbone and vision-language encoder
    feature_dim: int  # E
    heads: int  # contrastive heads h
    forward_flops: int  # multiplications and additions of a forward pass
    backward_flops: int  # of the backward pass: twice that where everything is trained, without that of the pixels
    activation_bytes: int  # kept for backward
    layer_activation_bytes: int  # kept by one full layer, of the larger modality
    layer_input_bytes: int  # inputs of the layers passed backward, which activation checkpointing keeps instead
    work_bytes: int  # the two widest gradients of a backward pass, alive beside the activations
    batch_bytes: int  # pixels, in 8 bits, and token ids
    autocast_bytes_per_parameter: int  # copies of the weights that mixed precision keeps during a pass


class _Layer(NamedTuple):
    """A layer as one modality passes it; matrices in units of those of a plain layer, D²(4 + 2f)."""

    matrices: float  # all of them: 1, and more where an adaptation adds some
    trained: float  # of these, those with a gradient
    is_trained: bool  # whether anything of it is
    norm_is_trained: bool  # whether its first norm is
    read: frozenset[str]  # matrices whose input is kept, as they or what stands beside them are trained
    rank: float  # sum of the ranks of low-rank updates, whose inputs are kept, too
    networks: int  # feed-forward networks that a token passes: 1, and more in a mixture
    networks_trained: bool  # whether those beyond the first one are

    def more(self, ratio: int) -> float:
        """Matrices of the networks beyond the first one."""
        return (self.networks - 1) * 2 * ratio / (4 + 2 * ratio)


class _Tower(NamedTuple):
    """What one modality passes."""

    tokens: int
    embeds: bool  # whether anything of its embedding is trained
    layers: tuple[_Layer, ...]  # backbone, then vision-language encoder
    num_backbone: int  # of these, those of the backbone
    heads: tuple[bool, ...]  # whether each projection is trained


class _Sums(NamedTuple):
    """Of one tower and pair."""

    forward: float  # operations of its layers and heads
    backward: float
    kept: float  # bytes kept for backward
    layer: int  # bytes that the largest layer keeps, of those that are passed backward
    passed: int  # layers that are


def estimate_cost(
    config: M2EncoderConfig,
    *,
    precision: str = "bf16-mixed",
    text_tokens: int | None = None,
    heads: int = 1,
    adapt: Callable[[M2Encoder], None] | None = None,
) -> ModelCost:
    """Costs of an architecture.

    Args:
        config: the architecture.
        precision: one of `PRECISIONS`.
        text_tokens: mean tokens of a text (padding costs nothing); None: the context length. More are for a longer one.
        heads: contrastive heads: 1 for the features of the vision-language encoder, 2 for those of the backbone, too.
        adapt: freezes or adds parameters, of a model on `meta`, as `Adaptation.apply`; None trains everything.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision} must be one of {', '.join(PRECISIONS)}")
    tokens = config.context_length if text_tokens is None else text_tokens
    longest = config.num_text_positions - NUM_RESERVED_POSITIONS
    if not 2 <= tokens <= longest:
        raise UserError(f"text_tokens={tokens} must be in 2..{longest}, the positions of the model")
    if heads not in _LOGIT_HEADS:
        raise UserError(f"heads={heads} must be 1 or 2")
    mixed = precision != "32-true"
    model = _build(config, heads, adapt)
    patch_flops = 2 * 3 * config.patch_size**2 * config.embed_dim * config.grid_size**2
    trains_patches = model.image_embed.proj.weight.requires_grad
    towers = [
        _read_tower(model, name, tokens=number, heads=heads)
        for name, number in (("image", config.num_image_tokens), ("text", tokens))
    ]
    image, text = sums = [_add_up(config, tower, mixed=mixed) for tower in towers]
    pixel_bytes = (2 if mixed else 4) * 3 * config.image_size**2  # the patch projection keeps the normalised pixels
    layer_inputs = sum(each.passed * tower.tokens for each, tower in zip(sums, towers, strict=True))
    return ModelCost(
        name=config.name,
        **_count_parameters(model),
        num_layers=config.num_layers + config.num_vl_layers,
        feature_dim=config.feature_dim,
        heads=heads,
        forward_flops=round(patch_flops + image.forward + text.forward),
        backward_flops=round(patch_flops * trains_patches + image.backward + text.backward),
        activation_bytes=round(image.kept + text.kept + pixel_bytes * trains_patches),
        layer_activation_bytes=max(image.layer, text.layer),
        layer_input_bytes=4 * config.embed_dim * layer_inputs,
        work_bytes=2 * 4 * config.ffn_ratio * config.embed_dim * max(config.num_image_tokens, tokens),
        batch_bytes=3 * config.image_size**2 + 8 * config.context_length,
        autocast_bytes_per_parameter=2 if mixed else 0,
    )


def _build(config: M2EncoderConfig, heads: int, adapt: Callable[[M2Encoder], None] | None) -> M2Encoder:
    """The model as a run trains it, of which no parameter takes memory."""
    with torch.device("meta"):
        model = M2Encoder(config)
        if adapt is not None:
            adapt(model)
    model.freeze_parts(OPTIONAL_PARTS.keys() - _LOGIT_HEADS[heads])
    return model


def _count_parameters(model: M2Encoder) -> dict[str, int]:
    def count(module: nn.Module, *, trained: bool) -> int:
        return sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)

    layers = [module for module in model.modules() if isinstance(module, MultiwayLayer)]
    found: dict[str, int] = {}
    for prefix, trained in (("", False), ("trainable_", True)):
        whole, inside = count(model, trained=trained), [count(layer, trained=trained) for layer in layers]
        found |= {f"{prefix}parameters": whole, f"{prefix}layer_parameters": max(inside)}
        found[f"{prefix}root_parameters"] = whole - sum(inside)
    return found


def _read_tower(model: M2Encoder, name: str, *, tokens: int, heads: int) -> _Tower:
    """Of `image` or `text`; both pass the vision experts of the vision-language encoder."""
    expert = "vision_expert" if name == "image" else "text_expert"
    embedding = model.image_embed if name == "image" else model.text_embed
    passed = [(getattr(layer, expert), _adds(layer, name)) for layer in model.backbone.layers]
    passed += [(layer.vision_expert, False) for layer in model.vl_encoder.layers]
    config = model.config
    plain = config.embed_dim**2 * (4 + 2 * config.ffn_ratio)
    projections = [f"vl_{name}_proj", f"{name}_proj"][:heads]
    return _Tower(
        tokens=tokens,
        embeds=any(parameter.requires_grad for parameter in embedding.parameters()),
        layers=tuple(_read_layer(each, plain, adds=adds) for each, adds in passed),
        num_backbone=config.num_layers,
        heads=tuple(getattr(model, each).weight.requires_grad for each in projections),
    )


def _adds(layer: Any, name: str) -> bool:
    """Whether prompts of a layer are trained, or adapters, which texts alone pass; they are too small to count more."""
    parts = [layer.prompts, layer.adapters if name == "text" else None]
    return any(each.requires_grad for part in parts if part is not None for each in part.parameters())


def _read_layer(expert: nn.Module, plain: int, *, adds: bool) -> _Layer:
    total, trained, rank, read = 0, 0, 0.0, set()
    for name in _MATRICES:
        weight, *beside = (each for each in getattr(expert, name).parameters() if each.ndim == 2)
        numbers = [each.numel() for each in (weight, *beside)]
        own = [number for each, number in zip((weight, *beside), numbers, strict=True) if each.requires_grad]
        total, trained, rank = total + sum(numbers), trained + sum(own), rank + sum(numbers[1:]) / sum(weight.shape)
        read |= {name} if own else set()
    is_trained = adds or any(each.requires_grad for each in expert.parameters())
    norm_is_trained = any(each.requires_grad for each in expert.get_submodule("attention_norm").parameters())
    mixture: Any = expert.mixture  # of whose router the few numbers are left out
    networks = 1 if mixture is None else mixture.top_k
    networks_trained = mixture is not None and mixture.router.weight.requires_grad
    parts = is_trained, norm_is_trained, frozenset(read), rank, networks, networks_trained
    return _Layer(total / plain, trained / plain, *parts)


def _add_up(config: M2EncoderConfig, tower: _Tower, *, mixed: bool) -> _Sums:
    """From below: what is not above anything trained is not passed backward, and keeps nothing."""
    width, tokens = config.embed_dim, tower.tokens
    passes, forward, backward, kept, largest, passed = tower.embeds, 0.0, 0.0, 0.0, 0, 0
    for number, layer in enumerate(tower.layers):
        is_last = number == len(tower.layers) - 1
        matrices, attention = _layer_flops(config, tokens, is_last=is_last)
        more = layer.more(config.ffn_ratio)
        forward += matrices * (layer.matrices + more) + attention
        if layer.is_trained and not (passes or layer.norm_is_trained):
            # The lowest: q, k and v end it; or fc1, where attention is frozen, which then keeps nothing either.
            if ends_early := not is_last and bool(layer.read) and layer.read <= {"fc1", "fc2"}:
                kept -= (20 if mixed else 24) * tokens * width
                backward -= 2 * attention
            ends = 4 + layer.networks * config.ffn_ratio if ends_early else 3
            backward -= matrices * layer.matrices * ends / (4 + 2 * config.ffn_ratio)
        passes = passes or layer.is_trained
        if passes:
            passed += 1
            backward += matrices * (layer.matrices + layer.trained) + 2 * attention
            backward += matrices * more * (1 + layer.networks_trained)
            whole = _layer_bytes(config, tokens, layer, mixed=mixed)
            kept += _last_bytes(config, tokens, layer, mixed=mixed) if is_last else whole
            largest = max(largest, whole)
        if number == tower.num_backbone - 1 and passes:
            kept += 4 * tokens * width  # its final norm
    head = 2 * width * config.feature_dim
    forward += head * len(tower.heads)
    backward += head * (sum(tower.heads) + (len(tower.heads) if passes else 0))
    return _Sums(forward, backward, kept, largest, passed)


def _layer_flops(config: M2EncoderConfig, tokens: int, *, is_last: bool) -> tuple[int, int]:
    """Operations of its matrices and of its attention.

    The last layer computes token 0 alone, for which it needs the keys and values of all.
    """
    width = config.embed_dim
    matrices = 2 * width**2 * (4 + 2 * config.ffn_ratio)  # q, k, v, output and the feed-forward network, of one token
    if not is_last:
        return tokens * matrices, 2 * 2 * tokens**2 * width
    return tokens * 2 * 2 * width**2 + (matrices - 2 * 2 * width**2), 2 * 2 * tokens * width


def _layer_bytes(config: M2EncoderConfig, tokens: int, layer: _Layer, *, mixed: bool) -> int:
    """Bytes that one full layer keeps for backward.

    In fp32: input, its norm, q, k, v, attention, its norm, the second residual and its norm, each (N, D); the first
    matrix's output, its activation and the norm of that, each (N, fD). Autocast runs norms in fp32, so it keeps their
    inputs in 4 bytes and a copy of their outputs in 2, once per matrix that reads it: three for q, k and v. Outputs of
    norms are kept for the gradients of the matrices that read them, so not where those are frozen. In a mixture each
    network that a token passes keeps its own, beside the token, and what its output differs by from the first one's.
    """
    wide = config.ffn_ratio
    sizes = {name: wide if name == "fc2" else 1 for name in layer.read}
    if mixed:
        per_token = 20 + 6 * wide + 2 * sum(sizes.values())
    else:
        shared = max(0, len(layer.read & {"q_proj", "k_proj", "v_proj"}) - 1)
        per_token = 4 * (6 + 2 * wide + sum(sizes.values()) - shared)
    statistics = 4 * config.num_heads + 4 * 2 * 4  # logsumexp of the attention; mean and deviation of four norms
    low = layer.rank * (2 if mixed else 4)
    if (more := layer.networks - 1) > 0:
        trained = layer.networks_trained
        half = 2 if mixed else 4
        inside = (6 if mixed else 8) * wide + half * wide * trained
        per_token += more * (inside + half) + (more + 1) * half * trained + 4 * mixed * trained
    return round(tokens * (per_token * config.embed_dim + statistics + low))


def _last_bytes(config: M2EncoderConfig, tokens: int, layer: _Layer, *, mixed: bool) -> int:
    """Bytes of the last layer: its input, the norm of it, keys and values of all tokens; the rest is one token wide."""
    readers = len(layer.read & {"k_proj", "v_proj"})
    per_token = 8 + 2 * readers if mixed else 12 + 4 * min(1, readers)
    return per_token * tokens * config.embed_dim + _layer_bytes(config, 1, layer, mixed=mixed)
