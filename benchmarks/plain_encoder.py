"""M2-Encoder as plain formulas on a dictionary of official parameters: the yardstick of tests and benchmarks.

Written from the description of the model and not from the package: explicit softmax attention, texts padded
to the end, an expert chosen per token, both encoders over all tokens, no shortcut. It works in the precision
of its parameters, so that it can serve in fp64.

Letters: B batch · N tokens · D width · H heads · E feature dim. In masks given here, True hides a key (as in
the official code, and unlike the package).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PlainOutput(NamedTuple):
    """Outputs of one pass: hidden states (B, N, D) and L2-normalised features (B, E)."""

    backbone: Tensor
    vl: Tensor
    cls_feats: Tensor
    cls_vlffn_feats: Tensor


class PlainEncoder:
    """The formulas.

    Args:
        weights: parameters under their official names.
        num_heads: H.
        eps: of every LayerNorm.
    """

    def __init__(self, weights: dict[str, Tensor], *, num_heads: int, eps: float = 1e-5) -> None:
        self.weights = weights
        self.num_heads = num_heads
        self.eps = eps

    def _layers(self, encoder: str) -> int:
        return len({name.split("layers.")[1].split(".")[0] for name in self.weights if f"{encoder}.layers." in name})

    # --------------------------------------------------------------------------------------------- primitives

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps
        )

    def _route(
        self,
        x: Tensor,
        is_image: Tensor,
        operation: Callable[[Tensor, str], Tensor],
        before: str,
        after: str = "",
    ) -> Tensor:
        """Apply `before.A.after` to image tokens and `before.B.after` to text tokens; `is_image` is (N,)."""
        if bool(is_image.all()):
            return operation(x, f"{before}.A{after}")
        if not bool(is_image.any()):
            return operation(x, f"{before}.B{after}")
        return torch.where(is_image[:, None], operation(x, f"{before}.A{after}"), operation(x, f"{before}.B{after}"))

    # ------------------------------------------------------------------------------------------------ encoder

    def _attention(self, x: Tensor, layer: str, is_image: Tensor, padding: Tensor, blocked: Tensor | None) -> Tensor:
        batch, length, width = x.shape

        def heads(kind: str) -> Tensor:
            projected = self._route(x, is_image, self._linear, f"{layer}.self_attn.{kind}_proj")
            return projected.view(batch, length, self.num_heads, -1).permute(0, 2, 1, 3)

        q, k, v = heads("q"), heads("k"), heads("v")
        scores = (q * (width // self.num_heads) ** -0.5) @ k.transpose(-1, -2)
        if blocked is not None:
            blocked = blocked if blocked.dim() == 2 else blocked[:, None]
            scores = scores + blocked * -1e8
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        precise = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, dim=-1, dtype=precise).to(scores.dtype)
        merged = (probabilities @ v).permute(0, 2, 1, 3).reshape(batch, length, width)
        merged = self._route(merged, is_image, self._norm, f"{layer}.self_attn.inner_attn_ln")
        return self._route(merged, is_image, self._linear, f"{layer}.self_attn.out_proj")

    def _feed_forward(self, x: Tensor, expert: str) -> Tensor:
        x = functional.gelu(self._linear(x, f"{expert}.fc1"))
        return self._linear(self._norm(x, f"{expert}.ffn_layernorm"), f"{expert}.fc2")

    def encode(
        self, encoder: str, x: Tensor, is_image: Tensor, padding: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        """One encoder, `backbone.encoder` or `backbone_vl`, over (B, N, D)."""
        x = x * (1 - padding.to(x.dtype))[..., None]
        for i in range(self._layers(encoder)):
            layer = f"{encoder}.layers.{i}"
            h = self._route(x, is_image, self._norm, f"{layer}.self_attn_layer_norm")
            x = x + self._attention(h, layer, is_image, padding, blocked)
            h = self._route(x, is_image, self._norm, f"{layer}.final_layer_norm")
            x = x + self._route(h, is_image, self._feed_forward, f"{layer}.ffn")
        return self._route(x, is_image, self._norm, f"{encoder}.layer_norm")

    # ------------------------------------------------------------------------------------------ whole passes

    def embed_image(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Images (B, 3, S, S) in 0..1 to (B, N, D); `masked` (B, patches) is True on masked patches."""
        w = self.weights
        kernel = w["backbone.vision_embed.proj.weight"]
        patches = functional.conv2d(
            (images.to(kernel.dtype) - 0.5) / 0.5,
            kernel,
            w["backbone.vision_embed.proj.bias"],
            stride=kernel.shape[-1],
        )
        x = patches.permute(0, 2, 3, 1).reshape(len(images), -1, kernel.shape[0])
        if masked is not None:
            x = torch.where(masked[..., None], w["backbone.vision_embed.mask_token"], x)
        x = torch.cat([w["backbone.vision_embed.cls_token"].repeat(len(images), 1, 1), x], dim=1)
        rows = torch.arange(x.shape[1]) + 2
        return x + w["backbone.encoder.embed_positions.A.weight"][rows]

    def embed_text(self, ids: Tensor) -> Tensor:
        """Ids (B, N) to (B, N, D)."""
        rows = torch.arange(ids.shape[1]) + 2
        table = self.weights["backbone.text_embed.weight"]
        return table[ids] + self.weights["backbone.encoder.embed_positions.B.weight"][rows]

    def image(self, images: Tensor, masked: Tensor | None = None) -> PlainOutput:
        """Arguments as in `embed_image`."""
        x = self.embed_image(images, masked)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        everything = torch.ones(x.shape[1], dtype=torch.bool)
        backbone = self.encode("backbone.encoder", x, everything, padding)
        return self._output(backbone, self.encode("backbone_vl", backbone, everything, padding), "image")

    def text(self, ids: Tensor, mask: Tensor, blocked: Tensor | None = None) -> PlainOutput:
        """Ids and mask (B, N), mask non-zero on tokens; the second encoder treats text like image tokens."""
        x, padding = self.embed_text(ids), mask == 0
        nothing = torch.zeros(x.shape[1], dtype=torch.bool)
        backbone = self.encode("backbone.encoder", x, nothing, padding, blocked)
        return self._output(backbone, self.encode("backbone_vl", backbone, ~nothing, padding, blocked), "text")

    def fusion(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        *,
        blocked: Tensor | None = None,
        vl_text_expert: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Backbone and second encoder over [image, text], every text repeated to match the images."""
        image, text = self.embed_image(images), self.embed_text(ids)
        repeats = len(image) // len(text)
        text, mask = text.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
        is_image = torch.arange(image.shape[1] + text.shape[1]) < image.shape[1]
        padding = torch.cat([torch.zeros(image.shape[:2], dtype=torch.bool), mask == 0], dim=1)
        backbone = self.encode("backbone.encoder", torch.cat([image, text], 1), is_image, padding, blocked)
        vl_route = is_image if vl_text_expert else torch.ones_like(is_image)
        return backbone, self.encode("backbone_vl", backbone, vl_route, padding, blocked)

    def _output(self, backbone: Tensor, vl: Tensor, modality: str) -> PlainOutput:
        plain = self._linear(backbone[:, 0], f"itc_{modality}_proj.fc")
        joint = self._linear(vl[:, 0], f"itc_vl_{modality}_proj.fc")
        return PlainOutput(backbone, vl, *(f / f.norm(dim=-1, keepdim=True) for f in (plain, joint)))
