"""Models with prompts, adapters and mixtures, and their yardstick."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain_encoder import PlainEncoder
from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.adapters import to_official_state
from tests.support.models import random_model, small_config

MIXTURE_FIELDS = ("mixture_copies", "mixture_top_k", "mixture_vision_layers", "mixture_text_layers")
COPIED = [f"{part}.{kind}" for part in ("fc1", "ffn_inner_norm", "fc2") for kind in ("weight", "bias")]


class PlainAdaptedEncoder(PlainEncoder):
    """The plain formulas with added parts; prompts are tokens behind the sequence, whose outputs every layer drops.

    Args:
        model: with any of them, or none.
    """

    def __init__(self, model: M2Encoder) -> None:
        state = {name: value.detach() for name, value in model.state_dict().items()}
        own = ("prompts", "adapters", "han_pieces", "mixture")
        official = to_official_state({n: v for n, v in state.items() if not any(part in n for part in own)})
        super().__init__(official, num_heads=model.config.num_heads, eps=model.config.layer_norm_eps)
        self.copies, self.top_k = model.config.mixture_copies, model.config.mixture_top_k
        self.added = {name: value for name, value in state.items() if any(part in name for part in own)}
        self.is_chinese: list[bool] = []

    def text(self, ids: Tensor, mask: Tensor, blocked: Tensor | None = None) -> Any:
        self._read(ids, mask)
        return super().text(ids, mask, blocked)

    def fusion(self, images: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        self._read(ids, mask, repeats=len(images) // len(ids))
        return super().fusion(images, ids, mask, **options)

    def _read(self, ids: Tensor, mask: Tensor, repeats: int = 1) -> None:
        table = self.added.get("text_embed.han_pieces", torch.zeros(int(ids.max()) + 1))
        found = [
            any(table[i] == 1 for i, kept in zip(*row, strict=True) if kept) for row in zip(ids, mask, strict=True)
        ]
        self.is_chinese = [each for each in found for _ in range(repeats)]

    def _attention(self, x: Tensor, layer: str, is_image: Tensor, padding: Tensor, blocked: Tensor | None) -> Tensor:
        length, name = x.shape[1], layer.replace("backbone.encoder", "backbone")
        for kind, letter, here in (("vision", "A", is_image.any()), ("text", "B", (~is_image).any())):
            if f"{name}.prompts.{kind}" not in self.added or not here:
                continue
            prompts = self._norm(self.added[f"{name}.prompts.{kind}"], f"{layer}.self_attn_layer_norm.{letter}")
            x = torch.cat([x, prompts.repeat(len(x), 1, 1)], dim=1)
            is_image = torch.cat([is_image, torch.full((len(prompts),), kind == "vision")])
            padding = functional.pad(padding, (0, len(prompts)))
            if blocked is not None:
                blocked = functional.pad(blocked.to(x.dtype), (0, len(prompts), 0, len(prompts)))
        return super()._attention(x, layer, is_image, padding, blocked)[:, :length]

    def encode(
        self, encoder: str, x: Tensor, is_image: Tensor, padding: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        x = x * (1 - padding.to(x.dtype))[..., None]
        for i in range(self._layers(encoder)):
            layer = f"{encoder}.layers.{i}"
            h = self._route(x, is_image, self._norm, f"{layer}.self_attn_layer_norm")
            x = x + self._attention(h, layer, is_image, padding, blocked)
            h = self._route(x, is_image, self._norm, f"{layer}.final_layer_norm")
            x = x + self._route(h, is_image, self._feed_forward, f"{layer}.ffn")
            if encoder == "backbone.encoder" and not bool(is_image.all()) and "text_embed.han_pieces" in self.added:
                first = int(is_image.sum())
                adapted = [self._adapt(row[first:], i, zh) for row, zh in zip(x, self.is_chinese, strict=True)]
                x = torch.cat([x[:, :first], torch.stack(adapted)], dim=1)
        return self._route(x, is_image, self._norm, f"{encoder}.layer_norm")

    def _feed_forward(self, x: Tensor, expert: str) -> Tensor:
        layer, letter = expert.replace("backbone.encoder", "backbone").split(".ffn.")
        mixture = f"{layer}.{'vision' if letter == 'A' else 'text'}_expert.mixture"
        if f"{mixture}.router.weight" not in self.added:
            return super()._feed_forward(x, expert)
        mixed = torch.zeros_like(x)
        for place in itertools.product(*map(range, x.shape[:-1])):  # token by token
            chances = torch.softmax(self.added[f"{mixture}.router.weight"] @ x[place], dim=0)
            chosen = sorted(range(self.copies), key=lambda copy: -float(chances[copy]))[: self.top_k]
            for each in chosen:
                share = chances[each] / sum(chances[other] for other in chosen)
                if each == 0:
                    mixed[place] += share * super()._feed_forward(x[place], expert)
                    continue
                w = {name: self.added[f"{mixture}.copies.{each - 1}.{name}"] for name in COPIED}
                hidden = functional.gelu(w["fc1.weight"] @ x[place] + w["fc1.bias"])
                hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + self.eps).sqrt()
                hidden = hidden * w["ffn_inner_norm.weight"] + w["ffn_inner_norm.bias"]
                mixed[place] += share * (w["fc2.weight"] @ hidden + w["fc2.bias"])
        return mixed

    def _adapt(self, x: Tensor, layer: int, is_chinese: bool) -> Tensor:
        w, name = self.added, f"backbone.layers.{layer}.adapters.{'zh' if is_chinese else 'en'}"
        hidden = functional.gelu(x @ w[f"{name}.down.weight"].t() + w[f"{name}.down.bias"])
        return x + hidden @ w[f"{name}.up.weight"].t() + w[f"{name}.up.bias"]


def adapted_config(**overrides: Any) -> M2EncoderConfig:
    """Prompts in one of two layers, adapters in both, mixtures in one for pictures and in both for texts."""
    mixtures = dict(zip(MIXTURE_FIELDS, (3, 2, 1, 2), strict=True))
    return small_config(**{"num_prompts": 3, "prompt_layers": 1, "adapter_width": 5, **mixtures, **overrides})


def random_adapted_model(config: M2EncoderConfig, *, dtype: torch.dtype = torch.float32) -> M2Encoder:
    """As `random_model`; every ninth piece is Chinese."""
    model = random_model(config, dtype=dtype)
    if config.adapter_width:
        model.text_embed.han_pieces.copy_((torch.arange(config.vocab_size) % 9 == 0).float())
    return model


def without_parts(model: M2Encoder) -> M2Encoder:
    """The plain model inside."""
    none = dict.fromkeys(MIXTURE_FIELDS, 0)
    bare = dataclasses.replace(model.config, num_prompts=0, prompt_layers=0, adapter_width=0, **none)
    plain = M2Encoder(bare).to(model.logit_scale.dtype).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    return plain


class FewPieces:
    """A stand-in for the tokenizer of a vocabulary of which every ninth piece is Chinese."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def pieces(self, ids: range) -> list[str]:
        return ["猫" if index % 9 == 0 else "cat" for index in ids]
