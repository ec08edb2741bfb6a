"""Multiway transformer: two experts per layer with a common attention.

An expert holds all parameters of a transformer layer: norms, q/k/v/output projections and the feed-forward network. The
first `num_image_tokens` of a sequence go to the *vision expert*, the others to the *text expert*. The number is an
argument of every call, not state of a module, so that several threads can use one model.

Reference: BEiT-3 (arXiv:2208.10442), multiway transformers; sub-LayerNorm: Magneto (arXiv:2210.06423);
stochastic depth: arXiv:1603.09382.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.mixture import Mixture, Routing, feed_forward
from m2_encoder.models.selected_tokens import SelectedTokens
from m2_encoder.models.unpadded_text import UnpaddedText, append_keys, has_padding

EXPERTS = ("vision_expert", "text_expert")
"""Names of the two branches (`A` and `B` in the official checkpoints)."""


class TransformerExpert(nn.Module):
    """All parameters of one pre-norm, sub-LN transformer layer for one kind of token.

    Attributes:
        mixture: copies of the feed-forward network, of which a token passes some; None for the network alone.
    """

    mixture: Mixture | None

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        width, hidden, eps = config.embed_dim, config.ffn_ratio * config.embed_dim, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.attention_inner_norm = nn.LayerNorm(width, eps=eps)
        self.out_proj = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.ffn_inner_norm = nn.LayerNorm(hidden, eps=eps)
        self.fc2 = nn.Linear(hidden, width)
        self.mixture = None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, *, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to q of the first `num_queries` tokens, (B, H, num_queries, D/H), and k and v, (B, H, N, D/H)."""
        x = self.attention_norm(x)
        return (
            self._heads(self.q_proj(x[:, :num_queries])),
            self._heads(self.k_proj(x)),
            self._heads(self.v_proj(x)),
        )

    def project_keys(self, x: Tensor, unpadded: UnpaddedText | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, D) to k and v, (B, H, N, D/H) each; on padding, those of some token.

        Args:
            x: (B, N, D).
            unpadded: of x, to project no padding.
        """
        if unpadded is None:
            x = self.attention_norm(x)
            return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        x = self.attention_norm(unpadded.strip(x))
        return self._heads(unpadded.pad(self.k_proj(x))), self._heads(unpadded.pad(self.v_proj(x)))

    def project_queries(self, x: Tensor, selected: SelectedTokens) -> Tensor:
        """Queries of selected tokens, (M, D) to (R, H, C, D/H)."""
        return self._heads(selected.spread(self.q_proj(self.attention_norm(x))))

    def attention_output(self, attended: Tensor) -> Tensor:
        """Merge heads, normalise (sub-LN) and project: (B, H, N, D/H) -> (B, N, D)."""
        return self.out_proj(self.attention_inner_norm(attended.transpose(1, 2).flatten(2)))

    def feed_forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Feed-forward branch without its residual: (B, N, D) -> (B, N, D)."""
        x = self.ffn_norm(x)
        if self.mixture is None:
            return feed_forward(self, x)
        mixed: Tensor = self.mixture(x, partial(feed_forward, self), routing)
        return mixed


class MultiwayLayer(nn.Module):
    """One layer: two experts, one attention over the whole sequence, stochastic depth on both residuals.

    Attributes:
        prompts: further keys and values of the attention, see `added_parts.Prompts`; None for none.
        adapters: what text tokens pass behind the layer, see `added_parts.LanguageAdapters`; None for nothing.
    """

    prompts: nn.Module | None
    adapters: nn.Module | None

    def __init__(self, config: M2EncoderConfig, *, drop_path: float) -> None:
        super().__init__()
        self.vision_expert = TransformerExpert(config)
        self.text_expert = TransformerExpert(config)
        self.drop_path = drop_path
        self.prompts = self.adapters = None

    def forward(
        self,
        x: Tensor,
        *,
        num_image_tokens: int,
        mask: Tensor | None = None,
        unpadded: UnpaddedText | None = None,
        is_chinese: Tensor | None = None,
        first_token_only: bool = False,
        routing: Routing | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: (B, N, D).
            num_image_tokens: how many leading tokens the vision expert sees; the text expert sees the others.
            mask: True where a query may look at a key, broadcastable to (B, H, N, N) bool.
            unpadded: given if x holds texts without their padding, (1, M, D); then there is no mask.
            is_chinese: of each token's text, (B, 1, 1) or (1, M, 1) bool; needed by `adapters` where there is text.
            first_token_only: compute the output of token 0 alone, with all tokens as keys: much cheaper for the last
                layer before a head that reads only token 0.
            routing: takes what routers say of the tokens of each expert; None for nobody.

        Returns:
            (B, N, D), or (B, 1, D) with `first_token_only`.
        """
        routes = self._routes(x.shape[1], num_image_tokens)
        num_first = 1 if unpadded is None else unpadded.batch_size
        num_outputs = num_first if first_token_only else x.shape[1]
        parts = [
            expert.project(x[:, start:stop], num_queries=max(0, min(stop, num_outputs) - start))
            for expert, start, stop in routes
        ]
        q, k, v = (_join(heads, dim=2) for heads in zip(*parts, strict=True))
        if mask is not None and first_token_only and mask.shape[-2] > 1:
            mask = mask[..., :1, :]
        prompts = self._project_prompts(routes)
        if unpadded is None:
            k, v, mask = append_keys(k, v, mask, prompts)
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            attended = unpadded.attend(q, k, v, prompts)

        x = x[:, :num_outputs]
        routes = [(expert, start, min(stop, num_outputs)) for expert, start, stop in routes if start < num_outputs]
        x = x + self._drop(_join([e.attention_output(attended[:, :, a:b]) for e, a, b in routes], dim=1), unpadded)
        x = x + self._drop(_join([e.feed_forward(x[:, a:b], routing) for e, a, b in routes], dim=1), unpadded)
        return self._adapt(x, num_image_tokens, is_chinese)

    def read(
        self,
        image: Tensor,
        text: Tensor,
        *,
        selected: SelectedTokens,
        selects_text: bool,
        mask: Tensor,
        unpadded: UnpaddedText | None = None,
        text_expert: bool = False,
    ) -> Tensor:
        """`forward` on the sequence image + text, with the output of selected tokens only, (M, D).

        Keys and values of an image are computed once for all of its texts. Only for layers without added parts, such
        as those of the vision-language encoder.

        Args:
            image: (R / k, N, D); image i stands before texts k * i … k * i + k - 1.
            text: (R, T, D).
            selected: tokens of the texts, or of the images, a row for each text.
            selects_text: which of both.
            mask: True where a selected token may look at a key, broadcastable to (R, H, C, N + T) bool, C as in
                `SelectedTokens`.
            unpadded: of the texts, to project no padding.
            text_expert: send texts through the text expert.
        """
        of_text = self.text_expert if text_expert else self.vision_expert
        expert = of_text if selects_text else self.vision_expert
        repeats = text.shape[0] // max(1, image.shape[0])
        keys, values = (
            torch.cat([of_image.repeat_interleave(repeats, dim=0), of_text], dim=2)
            for of_image, of_text in zip(
                self.vision_expert.project_keys(image), of_text.project_keys(text, unpadded), strict=True
            )
        )
        x = selected.take(text if selects_text else image)
        queries = expert.project_queries(x, selected)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        branch = expert.attention_output(attended)
        x = x + self._drop_selected(selected.collect(branch), selected)
        return x + self._drop_selected(expert.feed_forward(x), selected)

    def _project_prompts(self, routes: list[tuple[TransformerExpert, int, int]]) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the prompts of experts that see tokens, (1, H, P, D/H) each."""
        if self.prompts is None:
            return None
        parts = [e.project_keys(self.prompts(of_text=e is self.text_expert).unsqueeze(0)) for e, _, _ in routes]
        keys, values = zip(*parts, strict=True)
        return _join(keys, dim=2), _join(values, dim=2)

    def _adapt(self, x: Tensor, num_image_tokens: int, is_chinese: Tensor | None) -> Tensor:
        """Send text tokens through the adapter of their language."""
        if self.adapters is None or num_image_tokens >= x.shape[1]:
            return x
        assert is_chinese is not None, "whoever encodes texts says their language"
        image, text = x[:, :num_image_tokens], x[:, num_image_tokens:]
        adapted = self.adapters(text, is_chinese[:, : text.shape[1]])
        return _join([image, adapted], dim=1) if num_image_tokens else adapted

    def _routes(self, length: int, num_image_tokens: int) -> list[tuple[TransformerExpert, int, int]]:
        split = (
            (self.vision_expert, 0, min(num_image_tokens, length)),
            (self.text_expert, num_image_tokens, length),
        )
        return [(expert, start, stop) for expert, start, stop in split if start < stop]

    def _drop(self, branch: Tensor, unpadded: UnpaddedText | None) -> Tensor:
        """Stochastic depth: drop a sample's branch with probability p, scale the others by 1/(1-p)."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = self._draw_kept(branch.shape[0] if unpadded is None else unpadded.batch_size, branch)
        if unpadded is not None:
            kept = kept[unpadded.texts[: branch.shape[1]]].transpose(0, 1)
        return branch * kept

    def _drop_selected(self, branch: Tensor, selected: SelectedTokens) -> Tensor:
        """As `_drop`, for selected tokens, (M, D); those of a row are dropped together."""
        if not self.training or self.drop_path == 0:
            return branch
        return branch * self._draw_kept(selected.num_rows, branch)[selected.rows, 0]

    def _draw_kept(self, samples: int, branch: Tensor) -> Tensor:
        keep = 1 - self.drop_path
        return torch.empty((samples, 1, 1), dtype=branch.dtype, device=branch.device).bernoulli_(keep) / keep


class MultiwayNorm(nn.Module):
    """LayerNorm with one set of parameters per expert."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.vision_expert = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.text_expert = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, *, num_image_tokens: int) -> Tensor:
        """Normalise (B, N, D); the first `num_image_tokens` tokens with the vision expert's parameters."""
        if num_image_tokens >= x.shape[1]:
            return self.vision_expert(x)
        if num_image_tokens == 0:
            return self.text_expert(x)
        image, text = x[:, :num_image_tokens], x[:, num_image_tokens:]
        return torch.cat([self.vision_expert(image), self.text_expert(text)], dim=1)


class MultiwayEncoder(nn.Module):
    """A stack of multiway layers and a final norm.

    Attributes:
        recompute_layers: in training, keep only the input of every layer, and run the layer again in backward.
    """

    def __init__(self, config: M2EncoderConfig, *, num_layers: int) -> None:
        super().__init__()
        self.recompute_layers = False
        last = max(1, num_layers - 1)
        self.layers = nn.ModuleList(
            MultiwayLayer(config, drop_path=config.drop_path_rate * i / last) for i in range(num_layers)
        )
        self.norm = MultiwayNorm(config)

    def forward(
        self,
        x: Tensor,
        *,
        num_image_tokens: int,
        token_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        unpadded: UnpaddedText | None = None,
        is_chinese: Tensor | None = None,
        first_token_only: bool = False,
        routing: Routing | None = None,
    ) -> Tensor:
        """Encode a sequence.

        Args:
            x: (B, N, D), positions already added.
            num_image_tokens: how many leading tokens the vision experts see: N for an image (or for any sequence that
                is to go through the vision experts), 0 for a text, the image's length for image + text.
            token_mask: True on tokens, False on padding, (B, N) bool. Padded tokens are zeroed at entry and hidden as
                keys; their own outputs are meaningless. None means that there is no padding.
            attention_mask: True where query i may look at key j, (N, N) or (B, N, N) bool.
            unpadded: given if x holds texts without their padding, (1, M, D); replaces both masks, one expert sees all.
            is_chinese: of each text, (B,) bool, as `TextEmbedding.find_chinese` says it.
            first_token_only: return token 0 alone, at a lower cost; of every text if `unpadded`.
            routing: takes what the routers say of (B, N) tokens, if one expert sees all; None for nobody.

        Returns:
            Normalised hidden states, (B, N, D) or (B, 1, D).
        """
        mask = None
        if unpadded is not None:
            x = x * unpadded.token_mask.unsqueeze(-1).to(x.dtype)
        if token_mask is not None:
            x = x * token_mask.unsqueeze(-1).to(x.dtype)
            mask = token_mask[:, None, None, :]
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dim() == 2 else attention_mask[:, None]
            mask = allowed if mask is None else mask & allowed
        if is_chinese is not None:
            per_token = is_chinese[:, None] if unpadded is None else is_chinese[unpadded.texts][None]
            is_chinese = per_token.unsqueeze(-1)
        for i, layer in enumerate(self.layers):
            own = None if routing is None else Routing()  # all layers look alike to a compiler
            x = self._run(
                layer,
                x,
                num_image_tokens=num_image_tokens,
                mask=mask,
                unpadded=unpadded,
                is_chinese=is_chinese,
                first_token_only=first_token_only and i == len(self.layers) - 1,
                routing=own,
            )
            if routing is not None and own is not None:
                routing.extend(own, unpadded)
        return self.norm(x, num_image_tokens=num_image_tokens)

    def read(
        self,
        image: Tensor,
        text: Tensor,
        *,
        selected: SelectedTokens,
        selects_text: bool,
        text_mask: Tensor,
        attention_mask: Tensor | None = None,
        text_expert: bool = False,
    ) -> Tensor:
        """Normalised hidden states of selected tokens, (M, D), of images and their texts as one sequence each.

        All layers but the last compute every token, since the last needs all keys; it runs `MultiwayLayer.read`.
        """
        text = text * text_mask.unsqueeze(-1).to(text.dtype)
        num_image_tokens = image.shape[1]
        split = num_image_tokens if text_expert else num_image_tokens + text.shape[1]
        unpadded = UnpaddedText(text_mask) if has_padding(text_mask) else None
        mask = selected_mask = functional.pad(text_mask, (num_image_tokens, 0), value=True)[:, None, None, :]
        if attention_mask is not None:
            places = selected.spread(selected.places + num_image_tokens if selects_text else selected.places)
            mask, selected_mask = mask & attention_mask, mask & attention_mask[places][:, None]
        *lower, last = self.layers
        assert isinstance(last, MultiwayLayer)
        if lower:
            image = image.repeat_interleave(text.shape[0] // max(1, image.shape[0]), dim=0)
            x = torch.cat([image, text], dim=1)
            for layer in lower:
                x = self._run(layer, x, num_image_tokens=split, mask=mask)
            image, text = x[:, :num_image_tokens], x[:, num_image_tokens:]
        x = self._run(
            last.read,
            image,
            text,
            selected=selected,
            selects_text=selects_text,
            mask=selected_mask,
            unpadded=unpadded,
            text_expert=text_expert,
        )
        norm: Tensor = (self.norm.text_expert if selects_text and text_expert else self.norm.vision_expert)(x)
        return norm

    def _run(self, layer: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
        if self.recompute_layers and self.training:
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False, **options)
            return output
        return layer(*inputs, **options)


def _join(parts: list[Tensor] | tuple[Tensor, ...], *, dim: int) -> Tensor:
    """Concatenate, without a copy where one expert saw everything."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)
