"""An M2-Encoder for Hugging Face transformers; Apache-2.0.

Features are those of `m2_encoder.load` on the same folder. Pixels come normalised, as the image processor of the folder
leaves them: (x - 0.5) / 0.5. Names of parameters are those of `model.safetensors`, unused ones included.

Letters: B rows · S side of a picture · T tokens · D width · E feature dim.

Reference: M2-Encoder (arXiv:2401.15896); multiway transformers: BEiT-3 (arXiv:2208.10442).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_m2_encoder import M2EncoderConfig

_RESERVED = 2  # rows of both position tables that nothing reads


@dataclass
class M2EncoderOutput(ModelOutput):
    """What `M2EncoderModel.forward` returns; what was not asked for is None."""

    loss: Tensor | None = None  # (), with `return_loss`
    logits_per_image: Tensor | None = None  # (B of images, B of texts)
    logits_per_text: Tensor | None = None  # (B of texts, B of images)
    text_embeds: Tensor | None = None  # (B, E), L2-normalised
    image_embeds: Tensor | None = None  # (B, E), L2-normalised


class FeedForwardCopy(nn.Module):
    """A further feed-forward network of a mixture."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = model["embed_dim"], model["ffn_ratio"] * model["embed_dim"]
        self.fc1 = nn.Linear(width, hidden)
        self.ffn_inner_norm = nn.LayerNorm(hidden, eps=model["layer_norm_eps"])
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) to (M, D)."""
        return self.fc2(self.ffn_inner_norm(functional.gelu(self.fc1(x))))


class Mixture(nn.Module):
    """Copies of a layer's feed-forward network, of which each token passes those that a router chooses."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.top_k = model["mixture_top_k"]
        self.router = nn.Linear(model["embed_dim"], model["mixture_copies"], bias=False)
        self.copies = nn.ModuleList(FeedForwardCopy(model) for _ in range(model["mixture_copies"] - 1))

    def forward(self, x: Tensor, first: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, N, D) to (B, N, D); `first` is the layer's own network."""
        tokens = x.flatten(0, 1)
        best, chosen = functional.linear(tokens.float(), self.router.weight.float()).topk(self.top_k)
        shares = best.softmax(dim=-1).to(x.dtype)
        mixed = torch.zeros_like(tokens)
        for number, net in enumerate([first, *self.copies]):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            output = net(tokens[rows]) * shares[rows, places, None]
            mixed = mixed.index_add(0, rows, output.to(mixed.dtype))
        return mixed.view_as(x)


class TransformerExpert(nn.Module):
    """All parameters of one layer for one kind of token."""

    def __init__(self, model: dict[str, Any], *, has_mixture: bool = False) -> None:
        super().__init__()
        width, hidden, eps = model["embed_dim"], model["ffn_ratio"] * model["embed_dim"], model["layer_norm_eps"]
        self.num_heads = model["num_heads"]
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
        self.mixture = Mixture(model) if has_mixture else None

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_inner_norm(functional.gelu(self.fc1(x))))

    def forward(self, x: Tensor, mask: Tensor | None, prompts: Tensor | None = None) -> Tensor:
        """One layer over (B, N, D); `mask` is True on tokens, (B, N) bool; all look at prompts, too, (P, D)."""
        sources = x if prompts is None else torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1)
        queries, sources = self.attention_norm(x), self.attention_norm(sources)
        q, k, v = (
            proj(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, normed in ((self.q_proj, queries), (self.k_proj, sources), (self.v_proj, sources))
        )
        more = 0 if prompts is None else len(prompts)
        keys = None if mask is None else functional.pad(mask, (0, more), value=True)[:, None, None, :]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
        x = x + self.out_proj(self.attention_inner_norm(attended))
        normed = self.ffn_norm(x)
        return x + (self._feed_forward(normed) if self.mixture is None else self.mixture(normed, self._feed_forward))


class Prompts(nn.Module):
    """Further keys and values of a layer's attention, for each kind of token."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.vision = nn.Parameter(torch.zeros(model["num_prompts"], model["embed_dim"]))
        self.text = nn.Parameter(torch.zeros(model["num_prompts"], model["embed_dim"]))


class Adapter(nn.Module):
    """What is added to the states of texts in one language."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.down = nn.Linear(model["embed_dim"], model["adapter_width"])
        self.up = nn.Linear(model["adapter_width"], model["embed_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.up(functional.gelu(self.down(x)))


class LanguageAdapters(nn.Module):
    """An adapter per language, of which each text takes its own."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.en, self.zh = Adapter(model), Adapter(model)

    def forward(self, x: Tensor, is_chinese: Tensor) -> Tensor:
        """(B, T, D) after the adapter of each text's language, (B,) bool."""
        return x + torch.where(is_chinese[:, None, None], self.zh(x), self.en(x))


class MultiwayLayer(nn.Module):
    """Two experts, of which one sees the whole sequence here, and what an adaptation has added."""

    def __init__(
        self, model: dict[str, Any], *, has_prompts: bool, has_adapters: bool, mixtures: Sequence[bool]
    ) -> None:
        super().__init__()
        self.vision_expert = TransformerExpert(model, has_mixture=mixtures[0])
        self.text_expert = TransformerExpert(model, has_mixture=mixtures[1])
        self.prompts = Prompts(model) if has_prompts else None
        self.adapters = LanguageAdapters(model) if has_adapters else None

    def forward(self, x: Tensor, expert: str, mask: Tensor | None, is_chinese: Tensor | None) -> Tensor:
        """(B, N, D) by one of the experts; `is_chinese` is of texts alone, (B,) bool."""
        prompts = None if self.prompts is None else getattr(self.prompts, expert.split("_")[0])
        x = getattr(self, expert)(x, mask, prompts)
        return x if self.adapters is None or is_chinese is None else self.adapters(x, is_chinese)


class MultiwayNorm(nn.Module):
    """A norm for each expert."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.vision_expert = nn.LayerNorm(model["embed_dim"], eps=model["layer_norm_eps"])
        self.text_expert = nn.LayerNorm(model["embed_dim"], eps=model["layer_norm_eps"])


class MultiwayEncoder(nn.Module):
    """A stack of layers and a norm.

    Args:
        model: sizes.
        num_layers: of the stack.
        prompts: how many of the first layers have prompts.
        adapters: whether all have adapters.
        mixtures: how many of the last layers have mixtures, for pictures and for texts.
    """

    def __init__(
        self,
        model: dict[str, Any],
        num_layers: int,
        *,
        prompts: int = 0,
        adapters: bool = False,
        mixtures: Sequence[int] = (0, 0),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MultiwayLayer(
                model,
                has_prompts=i < prompts,
                has_adapters=adapters,
                mixtures=[i >= num_layers - count for count in mixtures],
            )
            for i in range(num_layers)
        )
        self.norm = MultiwayNorm(model)

    def forward(self, x: Tensor, expert: str, mask: Tensor | None = None, is_chinese: Tensor | None = None) -> Tensor:
        """Hidden states of (B, N, D) by one of the experts; those of padded tokens are meaningless."""
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        for layer in self.layers:
            x = layer(x, expert, mask, is_chinese)
        return getattr(self.norm, expert)(x)


class ImageEmbedding(nn.Module):
    """Patches, a first token and positions."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, patch = model["embed_dim"], model["patch_size"]
        tokens = (model["image_size"] // patch) ** 2 + 1
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Embedding(tokens + _RESERVED, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, N, D)."""
        patches = self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions.weight[_RESERVED:]


class TextEmbedding(nn.Module):
    """Tokens and positions; `han_pieces` is 1 for ids with Chinese characters."""

    han_pieces: Tensor

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model["vocab_size"], model["embed_dim"])
        self.positions = nn.Embedding(model["num_text_positions"], model["embed_dim"])
        if model.get("adapter_width"):
            self.register_buffer("han_pieces", torch.zeros(model["vocab_size"]))

    def find_chinese(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Texts with a Chinese character, (B,) bool; None if no adapter wants to know."""
        if not hasattr(self, "han_pieces"):
            return None
        found = self.han_pieces[input_ids] > 0
        return (found if mask is None else found & mask).any(dim=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, D)."""
        return self.tokens(input_ids) + self.positions.weight[_RESERVED : _RESERVED + input_ids.shape[1]]


class M2EncoderModel(PreTrainedModel):
    """Features of pictures and of Chinese and English texts, in one space."""

    config_class = M2EncoderConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__(config)
        model = config.model
        width, features = model["embed_dim"], model["feature_dim"]
        scale = -math.log(model["initial_temperature"])
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.logit_vl_scale = nn.Parameter(torch.tensor(scale))
        self.image_embed = ImageEmbedding(model)
        self.text_embed = TextEmbedding(model)
        self.backbone = MultiwayEncoder(
            model,
            model["num_layers"],
            prompts=model.get("prompt_layers", 0),
            adapters=model.get("adapter_width", 0) > 0,
            mixtures=[model.get(f"mixture_{kind}_layers", 0) for kind in ("vision", "text")],
        )
        self.vl_encoder = MultiwayEncoder(model, model["num_vl_layers"])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pooler = nn.Linear(width, width)
        self.text_proj = nn.Linear(width, features, bias=False)
        self.image_proj = nn.Linear(width, features, bias=False)
        self.vl_text_proj = nn.Linear(width, features, bias=False)
        self.vl_image_proj = nn.Linear(width, features, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.text_embed.tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """L2-normalised features of pictures, (B, E), of what the image processor returns, (B, 3, S, S)."""
        side = self.config.model["image_size"]
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}, expected (B, 3, {side}, {side})")
        hidden = self.vl_encoder(self.backbone(self.image_embed(pixel_values), "vision_expert"), "vision_expert")
        return functional.normalize(self.vl_image_proj(hidden[:, 0]), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """L2-normalised features of texts, (B, E), of what the tokenizer returns; without a mask nothing is padding."""
        longest = self.config.model["num_text_positions"] - _RESERVED
        if input_ids.shape[1] > longest:
            raise ValueError(f"a text has {input_ids.shape[1]} tokens, the model holds {longest}: use truncation=True")
        mask = None if attention_mask is None else attention_mask.bool()
        is_chinese = self.text_embed.find_chinese(input_ids, mask)
        hidden = self.backbone(self.text_embed(input_ids), "text_expert", mask, is_chinese)
        return functional.normalize(self.vl_text_proj(self.vl_encoder(hidden, "vision_expert", mask)[:, 0]), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> M2EncoderOutput | tuple[Tensor, ...]:
        """Features of what is given, and similarities where both are.

        Args:
            input_ids: tokens of texts, (B, T).
            pixel_values: pictures, (B, 3, S, S).
            attention_mask: of the texts: 1 on tokens, 0 on padding, (B, T).
            return_loss: whether to compare picture i with text i against all others of this call (InfoNCE, both ways).
            return_dict: False for a plain tuple.

        Raises:
            ValueError: with `return_loss`, unless there are as many pictures as texts.
        """
        images = None if pixel_values is None else self.get_image_features(pixel_values)
        texts = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logits = loss = None
        if images is not None and texts is not None:
            scale = self.logit_scale.float().exp()
            logits = scale * images.float() @ texts.float().t()
        if return_loss:
            if logits is None or logits.shape[0] != logits.shape[1]:
                raise ValueError("return_loss needs as many pictures (pixel_values) as texts (input_ids)")
            target = torch.arange(len(logits), device=logits.device)
            loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target)) / 2
        output = M2EncoderOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            text_embeds=texts,
            image_embeds=images,
        )
        return output.to_tuple() if return_dict is False else output
