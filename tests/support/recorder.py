"""Intermediate results of a model, recorded through hooks under the names of the parity files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m2_encoder.models.multiway import EXPERTS, MultiwayEncoder

# name in the parity files -> (sub-module of an expert, whether its input or its output is meant)
_LAYER0 = {
    "self_attn_layer_norm": ("attention_norm", "output"),
    "attn_before_inner_ln": ("attention_inner_norm", "input"),
    "attn_after_inner_ln": ("attention_inner_norm", "output"),
    "attn_out": ("out_proj", "output"),
    "final_layer_norm": ("ffn_norm", "output"),
    "ffn_out": ("fc2", "output"),
    "q": ("q_proj", "output"),
    "k": ("k_proj", "output"),
}


@contextmanager
def record(encoder: MultiwayEncoder) -> Iterator[dict[str, Tensor]]:
    """Record one pass: `layer{i}.out`, `out`, and everything inside layer 0; experts joined, vision first."""
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output

        return hook

    def keep_part(name: str, side: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            part = inputs[0] if side == "input" else output
            seen[name] = torch.cat([seen[name], part], dim=1) if name in seen else part

        return hook

    def keep_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["layer0.in"] = inputs[0]

    for i, layer in enumerate(encoder.layers):
        handles.append(layer.register_forward_hook(keep(f"layer{i}.out")))
    handles.append(encoder.register_forward_hook(keep("out")))
    first = encoder.layers[0]
    handles.append(first.register_forward_pre_hook(keep_input))
    for expert in EXPERTS:
        for name, (module, side) in _LAYER0.items():
            target = first.get_submodule(f"{expert}.{module}")
            handles.append(target.register_forward_hook(keep_part(f"layer0.{name}", side)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(seen: dict[str, Tensor], num_heads: int, token_mask: Tensor | None = None) -> Tensor:
    """Softmax weights of layer 0 from the recorded queries and keys, (H, B, N, N)."""
    q, k = (seen[f"layer0.{name}"].unflatten(-1, (num_heads, -1)).transpose(1, 2) for name in "qk")
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1).transpose(0, 1)
