"""The bilingual image-text encoder, in plain torch.

Images and texts pass a multiway *backbone* (vision or text experts), then a *vision-language encoder* whose vision
experts serve both modalities. Token 0 of the result, projected and normalised, is the feature. Letters in shapes are
explained in `m2_encoder.types`.

Reference: M2-Encoder (arXiv:2401.15896).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.added_parts import add_adapters, add_mixtures, add_prompts, reset_added_parts
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.embeddings import ImageEmbedding, TextEmbedding, check_pixels
from m2_encoder.models.init import init_embedding_tables, init_encoder, init_heads
from m2_encoder.models.mixture import Routing
from m2_encoder.models.multiway import MultiwayEncoder
from m2_encoder.models.selected_tokens import SelectedTokens
from m2_encoder.models.token_prediction import token_cross_entropy
from m2_encoder.models.trainable_parts import is_part
from m2_encoder.models.trimming import trim_text
from m2_encoder.models.unpadded_text import UnpaddedText, has_padding
from m2_encoder.types import EncoderOutput, FusionOutput, HeadFeatures, TextTokens

_UNUSED_NORM_EPS = 1e-6


class M2Encoder(nn.Module):
    """M2-Encoder of any size.

    The published checkpoints also hold a pooler, a norm and text experts in the vision-language encoder that no
    released entry point uses. They are kept, so that a checkpoint survives a round trip unchanged.

    Args:
        config: the architecture. Build under `torch.device("meta")` for a model without memory.
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, features = config.embed_dim, config.feature_dim
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_vl_scale = nn.Parameter(torch.empty(()))
        self.image_embed = ImageEmbedding(config)
        self.text_embed = TextEmbedding(config)
        self.backbone = MultiwayEncoder(config, num_layers=config.num_layers)
        self.vl_encoder = MultiwayEncoder(config, num_layers=config.num_vl_layers)
        add_prompts(self.backbone, config)
        add_adapters(self.backbone, config)
        add_mixtures(self.backbone, config)
        self.norm = nn.LayerNorm(width, eps=_UNUSED_NORM_EPS)
        self.pooler = nn.Linear(width, width)
        self.text_proj = nn.Linear(width, features, bias=False)
        self.image_proj = nn.Linear(width, features, bias=False)
        self.vl_text_proj = nn.Linear(width, features, bias=False)
        self.vl_image_proj = nn.Linear(width, features, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters; also of a model built on `meta` and given memory by `to_empty`."""
        for scale in (self.logit_scale, self.logit_vl_scale):
            nn.init.constant_(scale, -math.log(self.config.initial_temperature))
        self.image_embed.proj.reset_parameters()
        nn.init.zeros_(self.image_embed.cls_token)
        nn.init.zeros_(self.image_embed.mask_token)
        init_embedding_tables(
            self.text_embed.tokens,
            self.image_embed.positions,
            self.text_embed.positions,
            position_std=self.config.position_init_std,
        )
        init_encoder(self.backbone)
        init_encoder(self.vl_encoder)
        reset_added_parts(self)
        self.norm.reset_parameters()
        init_heads(self.pooler, self.text_proj, self.image_proj, self.vl_text_proj, self.vl_image_proj)

    def freeze_parts(self, names: Iterable[str]) -> int:
        """Stop training some of `trainable_parts.PARTS`; returns how many scalars were frozen."""
        frozen = 0
        for parameter in self.part_parameters(names):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
        return frozen

    def part_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Parameters of some of `trainable_parts.PARTS`."""
        parts, layers = frozenset(names), self.config.num_vl_layers
        return [p for name, p in self.named_parameters() if is_part(name, parts, num_vl_layers=layers)]

    def logit_scales(self) -> tuple[Tensor, ...]:
        """Logarithms of the inverse temperatures of both heads."""
        return self.logit_scale, self.logit_vl_scale

    # ------------------------------------------------------------------------------------------------- features

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised features of images, (B, E).

        Args:
            images: (B, 3, S, S), floating in 0..1 or uint8 in 0..255; normalisation happens here.

        Raises:
            UserError: for another shape or dtype, and in evaluation mode for floating pixels that are not in 0..1.
        """
        self._check_pixels(images)
        return self._image_heads(images, backbone=False).features

    def encode_text(self, text: TextTokens | Tensor, mask: Tensor | None = None) -> Tensor:
        """L2-normalised features of texts, (B, E); padding costs nothing.

        Args:
            text: what the tokenizer returns, or the ids alone, (B, T) int64.
            mask: with ids alone: non-zero on tokens, zero on padding, (B, T); None means no padding.

        Raises:
            UserError: for ids outside the token table, a text without tokens, or a text beyond the position table.
        """
        return self._text_heads(self.trim_text(text, mask), backbone=False).features

    def encode_image_heads(self, images: Tensor) -> HeadFeatures:
        """Features of images from both heads; arguments and errors as in `encode_image`."""
        self._check_pixels(images)
        return self._image_heads(images, backbone=True)

    def encode_text_heads(self, text: TextTokens | Tensor, mask: Tensor | None = None) -> HeadFeatures:
        """Features of texts from both heads; arguments and errors as in `encode_text`."""
        return self._text_heads(self.trim_text(text, mask), backbone=True)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosine similarities, (B_image, B_text): features times features times exp(logit_scale).

        Computed in fp32 at least. `logit_scale` belongs to these features, as in the released model;
        `logit_vl_scale` belongs to `backbone_features`.
        """
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        with torch.autocast(image_features.device.type, enabled=False):  # it would multiply in half precision
            return self.logit_scale.to(dtype).exp() * image_features.to(dtype) @ text_features.to(dtype).t()

    # -------------------------------------------------------------------------------------------- whole outputs

    def forward_image(self, images: Tensor, *, patch_mask: Tensor | None = None) -> EncoderOutput:
        """Both feature pairs and all hidden states of images; `patch_mask` as in `ImageEmbedding`."""
        self._check_pixels(images)
        tokens = self.image_embed(images, patch_mask=patch_mask)
        length = tokens.shape[1]
        backbone_hidden = self.backbone(tokens, num_image_tokens=length)
        hidden = self.vl_encoder(backbone_hidden, num_image_tokens=length)
        return EncoderOutput(
            features=_normalize(self.vl_image_proj(hidden[:, 0])),
            backbone_features=_normalize(self.image_proj(backbone_hidden[:, 0])),
            hidden=hidden,
            backbone_hidden=backbone_hidden,
        )

    def forward_text(
        self, text: TextTokens | Tensor, mask: Tensor | None = None, *, attention_mask: Tensor | None = None
    ) -> EncoderOutput:
        """Both feature pairs and all hidden states of texts, trimmed to the longest text of the batch.

        Args:
            text: as in `encode_text`.
            mask: as in `encode_text`.
            attention_mask: True where token i may look at token j, (T, T) or (B, T, T) bool; e.g. causal.

        Returns:
            Hidden states have the trimmed length; those of padded tokens are meaningless.
        """
        tokens = self.trim_text(text, mask)
        length = tokens.ids.shape[1]
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[..., :length, :length]
        backbone_hidden = self._text_backbone(tokens, attention_mask=attention_mask)
        hidden = self.vl_encoder(
            backbone_hidden, num_image_tokens=length, token_mask=tokens.mask, attention_mask=attention_mask
        )
        return EncoderOutput(
            features=_normalize(self.vl_text_proj(hidden[:, 0])),
            backbone_features=_normalize(self.text_proj(backbone_hidden[:, 0])),
            hidden=hidden,
            backbone_hidden=backbone_hidden,
        )

    def forward_fusion(
        self,
        images: Tensor,
        text: TextTokens | Tensor,
        mask: Tensor | None = None,
        *,
        patch_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vl_text_expert: bool = False,
    ) -> FusionOutput:
        """Encode image and text as one sequence, so that each attends to the other.

        Args:
            images: as in `encode_image`, (B, 3, S, S). With k times as many images as texts, text row i goes with
                images k*i … k*i + k - 1.
            text: as in `encode_text`, (B / k, T).
            mask: as in `encode_text`.
            patch_mask: as in `ImageEmbedding`.
            attention_mask: True where token i may look at token j, (N + T, N + T) or (B, N + T, N + T) bool, for the
                untrimmed T.
            vl_text_expert: send text tokens through the text experts of the vision-language encoder, which the
                released features never use; otherwise everything goes through its vision experts.

        Returns:
            Hidden states of the whole sequence, text trimmed to the longest of the batch.

        Raises:
            UserError: if the number of images is no multiple of the number of texts.
        """
        self._check_pixels(images)
        tokens = self.trim_text(text, mask)
        image = self.image_embed(images, patch_mask=patch_mask)
        if tokens.ids.shape[0] == 0 or image.shape[0] % tokens.ids.shape[0]:
            raise UserError(f"{image.shape[0]} images cannot be divided among {tokens.ids.shape[0]} texts")
        repeats = image.shape[0] // tokens.ids.shape[0]
        embedded = self.text_embed(tokens.ids).repeat_interleave(repeats, dim=0)
        num_image_tokens = image.shape[1]
        length = num_image_tokens + embedded.shape[1]
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[..., :length, :length]
        image_mask = tokens.mask.new_ones((image.shape[0], num_image_tokens))
        token_mask = torch.cat([image_mask, tokens.mask.repeat_interleave(repeats, dim=0)], dim=1)
        is_chinese = self.text_embed.find_chinese(*tokens)
        backbone_hidden = self.backbone(
            torch.cat([image, embedded], dim=1),
            num_image_tokens=num_image_tokens,
            token_mask=token_mask,
            attention_mask=attention_mask,
            is_chinese=None if is_chinese is None else is_chinese.repeat_interleave(repeats, dim=0),
        )
        hidden = self.vl_encoder(
            backbone_hidden,
            num_image_tokens=num_image_tokens if vl_text_expert else length,
            token_mask=token_mask,
            attention_mask=attention_mask,
        )
        return FusionOutput(hidden, backbone_hidden, token_mask, num_image_tokens)

    # --------------------------------------------------------------------------------------------------- pieces

    def trim_text(self, text: TextTokens | Tensor, mask: Tensor | None = None) -> TextTokens:
        """Check texts and cut padding beyond the longest of the batch; see `trimming.trim_text`."""
        return trim_text(text, mask, vocab_size=self.config.vocab_size, max_tokens=self.config.num_text_positions - 2)

    def encode_image_backbone(
        self, images: Tensor, *, patch_mask: Tensor | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Hidden states of images, (B, N, D); arguments as in `forward_image`, `routing` as in the next method."""
        tokens = self.image_embed(images, patch_mask=patch_mask)
        return self.backbone(tokens, num_image_tokens=tokens.shape[1], routing=routing)

    def encode_text_backbone(
        self, tokens: TextTokens, *, attention_mask: Tensor | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Hidden states of trimmed texts after the backbone, (B, T, D); meaningless on padding.

        Args:
            tokens: of `trim_text`.
            attention_mask: as in `forward_text`.
            routing: takes what routers say of the tokens; None for nobody.
        """
        if attention_mask is not None or not has_padding(tokens.mask):
            return self._text_backbone(tokens, attention_mask=attention_mask, routing=routing)
        unpadded = UnpaddedText(tokens.mask)
        return unpadded.pad(self._text_backbone(tokens, unpadded=unpadded, routing=routing))

    def finish_image(self, backbone_hidden: Tensor) -> HeadFeatures:
        """Features of both heads of what `encode_image_backbone` gave."""
        hidden = self.vl_encoder(backbone_hidden, num_image_tokens=backbone_hidden.shape[1], first_token_only=True)
        return HeadFeatures(
            _normalize(self.vl_image_proj(hidden[:, 0])), _normalize(self.image_proj(backbone_hidden[:, 0]))
        )

    def finish_patches(self, backbone_hidden: Tensor) -> Tensor:
        """Patches of what `encode_image_backbone` gave, projected as images are, not normalised, (B, patches, E)."""
        hidden = self.vl_encoder(backbone_hidden, num_image_tokens=backbone_hidden.shape[1])
        projected: Tensor = self.vl_image_proj(hidden[:, 1:])
        return projected

    def finish_text(self, backbone_hidden: Tensor, mask: Tensor) -> HeadFeatures:
        """Features of both heads of what `encode_text_backbone` gave for texts with this mask, (B, T) bool."""
        if has_padding(mask):
            unpadded = UnpaddedText(mask)
            x = unpadded.strip(backbone_hidden)
            hidden = self.vl_encoder(x, num_image_tokens=x.shape[1], unpadded=unpadded, first_token_only=True)[0]
        else:
            x = backbone_hidden
            hidden = self.vl_encoder(x, num_image_tokens=x.shape[1], token_mask=mask, first_token_only=True)[:, 0]
        return HeadFeatures(_normalize(self.vl_text_proj(hidden)), _normalize(self.text_proj(backbone_hidden[:, 0])))

    def fuse(
        self,
        image_hidden: Tensor,
        text_hidden: Tensor,
        mask: Tensor,
        *,
        selected: Tensor | None = None,
        select_from: Literal["image", "text"] = "text",
        attention_mask: Tensor | None = None,
        text_expert: bool = False,
    ) -> Tensor:
        """Vision-language encoder over backbone states of images and texts, so that each attends to the other.

        The last layer computes the states of selected tokens only, of images or of texts.

        Args:
            image_hidden: (B, N, D).
            text_hidden: (k * B, T, D); text j goes with image j // k.
            mask: True on tokens of the texts, (k * B, T) bool.
            selected: True where a state is used, a row for each text: (k * B, T) bool, or (k * B, N) of the images.
                None for the first token alone.
            select_from: whose tokens are selected.
            attention_mask: as in `forward_fusion`, (N + T, N + T) bool.
            text_expert: send text tokens through the text experts; otherwise through the vision experts, too.

        Returns:
            States of the selected tokens, row by row, (M, D).
        """
        if selected is None:
            length = (text_hidden if select_from == "text" else image_hidden).shape[1]
            selected = (torch.arange(length, device=mask.device) == 0).expand(len(mask), length)
        return self.vl_encoder.read(
            image_hidden,
            text_hidden,
            selected=SelectedTokens(selected),
            selects_text=select_from == "text",
            text_mask=mask,
            attention_mask=attention_mask,
            text_expert=text_expert,
        )

    def token_losses(
        self, states: Tensor, bias: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy against the token table, or another one; see `token_prediction.token_cross_entropy`."""
        return token_cross_entropy(states, self.text_embed.tokens.weight if table is None else table, bias, targets)

    def _check_pixels(self, images: Tensor) -> None:
        """Not in training, where images come from the loader and the device would have to wait."""
        if not self.training and isinstance(images, Tensor):
            check_pixels(images)

    def _image_heads(self, images: Tensor, *, backbone: bool) -> HeadFeatures:
        tokens = self.image_embed(images)
        lower = self.backbone(tokens, num_image_tokens=tokens.shape[1])
        hidden = self.vl_encoder(lower, num_image_tokens=tokens.shape[1], first_token_only=True)
        return HeadFeatures(
            features=_normalize(self.vl_image_proj(hidden[:, 0])),
            backbone_features=_normalize(self.image_proj(lower[:, 0])) if backbone else None,
        )

    def _text_heads(self, tokens: TextTokens, *, backbone: bool) -> HeadFeatures:
        if tokens.ids.shape[0] == 0:
            empty = self.vl_text_proj.weight.new_zeros((0, self.config.feature_dim))
            return HeadFeatures(empty, empty if backbone else None)
        if not has_padding(tokens.mask):
            lower = self._text_backbone(tokens)
            # The released model sends texts, too, through the *vision* experts of the vision-language encoder.
            hidden = self.vl_encoder(
                lower, num_image_tokens=lower.shape[1], token_mask=tokens.mask, first_token_only=True
            )[:, 0]
            first = lower[:, 0]
        else:
            unpadded = UnpaddedText(tokens.mask)
            lower = self._text_backbone(tokens, unpadded=unpadded)
            hidden = self.vl_encoder(lower, num_image_tokens=lower.shape[1], unpadded=unpadded, first_token_only=True)
            hidden, first = hidden[0], lower[0, : unpadded.batch_size]
        return HeadFeatures(
            features=_normalize(self.vl_text_proj(hidden)),
            backbone_features=_normalize(self.text_proj(first)) if backbone else None,
        )

    def _text_backbone(self, tokens: TextTokens, *, unpadded: UnpaddedText | None = None, **options: Any) -> Tensor:
        """(B, T, D), or with `unpadded`, which replaces all masks, (1, M, D); options as of `MultiwayEncoder`."""
        x = self.text_embed(tokens.ids)
        return self.backbone(
            x if unpadded is None else unpadded.strip(x),
            num_image_tokens=0,
            token_mask=tokens.mask if unpadded is None else None,
            unpadded=unpadded,
            is_chinese=self.text_embed.find_chinese(*tokens),
            **options,
        )


def _normalize(features: Tensor) -> Tensor:
    """Divide by the L2 norm; no epsilon, as released."""
    return features / features.norm(dim=-1, keepdim=True)
