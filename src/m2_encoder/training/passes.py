"""The passes of the model that local objectives share, each run once per piece of a batch.

Image and text are encoded alone by the backbone; the vision-language layers then see both. So a caption with hidden
words needs one more pass of the text backbone only, and meets the image's hidden states that the contrastive loss had
computed anyway.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import EncodedPair
from m2_encoder.types import HeadFeatures, ImageTextBatch, TextTokens


class PiecePasses:
    """See `m2_encoder.objectives.base.Passes`.

    Args:
        model: whole or sharded.
        batch: the rows of the piece.
        allowed: names of passes that the objectives of the run declared.
        text_expert: send texts through the text experts of the vision-language layers when image and text meet there;
            otherwise through its vision experts, which serve both modalities in the released features.
    """

    def __init__(
        self, model: M2Encoder, batch: ImageTextBatch, *, allowed: frozenset[str], text_expert: bool = False
    ) -> None:
        self._model = model
        self._allowed = allowed
        self._text_expert = text_expert
        self._masked_images: list[tuple[Tensor, Tensor]] = []  # masks and what came of them
        self.batch = batch

    @cached_property
    def text(self) -> TextTokens:
        """The captions, trimmed to the longest."""
        return self._model.trim_text(self.batch.text)

    @cached_property
    def image_hidden(self) -> Tensor:
        """Of the backbone, (b, N, D)."""
        return self._model.encode_image_backbone(self.batch.images)

    @cached_property
    def text_hidden(self) -> Tensor:
        """Of the backbone, (k * b, T, D)."""
        return self._model.encode_text_backbone(self.text)

    @cached_property
    def image_heads(self) -> HeadFeatures:
        """Features of the images from both heads."""
        return self._model.finish_image(self.image_hidden)

    @cached_property
    def text_heads(self) -> HeadFeatures:
        """Features of the captions from both heads."""
        return self._model.finish_text(self.text_hidden, self.text.mask)

    @cached_property
    def pair(self) -> EncodedPair:
        """The clean passes."""
        return EncodedPair(
            self.image_hidden, self.text_hidden, self.text, self.image_heads.features, self.text_heads.features
        )

    @cached_property
    def patch_features(self) -> Tensor:
        """Clean patches in the space of the features, (b, patches, E), without a gradient."""
        hidden = self.image_hidden  # with its graph, which others will use
        with torch.no_grad():
            return self._model.finish_patches(hidden)

    @cached_property
    def hidden_tokens(self) -> Tensor:
        """Which tokens of the captions are to be predicted, (k * b, T) bool."""
        if self.batch.masked_text is None:
            raise UserError("an objective predicts hidden words, but the batch has none; set data masking up for it")
        return self.batch.masked_text.predicted[:, : self.text.ids.shape[1]]

    @cached_property
    def masked_text(self) -> Tensor:
        """Captions with hidden words beside their clean image: of the hidden tokens, (M, D)."""
        self._check("masked_text")
        chosen = self.hidden_tokens
        assert self.batch.masked_text is not None
        masked = TextTokens(self.batch.masked_text.ids[:, : chosen.shape[1]], self.text.mask)
        return self._fuse_text(self._model.encode_text_backbone(masked), chosen)

    @cached_property
    def caption(self) -> Tensor:
        """Captions beside their image, each token seeing the ones up to itself: of those with a next one, (M, D)."""
        self._check("caption")
        length = self.text.ids.shape[1]
        causal = torch.ones((length, length), dtype=torch.bool, device=self.text.ids.device).tril()
        hidden = self._model.encode_text_backbone(self.text, attention_mask=causal)
        patches = self.image_hidden.shape[1]
        # Image tokens see the image; a text token sees the image and the text up to itself.
        allowed = causal.new_zeros((patches + length, patches + length))
        allowed[:, :patches] = True
        allowed[patches:, patches:] = causal
        followed = functional.pad(self.text.mask[:, 1:], (0, 1))
        return self._fuse_text(hidden, followed, attention_mask=allowed)

    def masked_image(self, patch_mask: Tensor) -> Tensor:
        """Images with hidden patches beside their clean captions: of the hidden patches, once per caption, (M, D)."""
        self._check("masked_image")
        for known, states in self._masked_images:
            if known is patch_mask:
                return states
        hidden = self._model.encode_image_backbone(self.batch.images, patch_mask=patch_mask)
        patches = patch_mask.repeat_interleave(self.batch.captions_per_image, dim=0)
        states = self._model.fuse(
            hidden,
            self.text_hidden,
            self.text.mask,
            chosen=functional.pad(patches, (1, 0)),  # cls is never hidden
            reads="image",
            text_expert=self._text_expert,
        )
        self._masked_images.append((patch_mask, states))
        return states

    def token_losses(
        self, states: Tensor, bias: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of tokens, (M,), and whether the target scored highest, (M,)."""
        return self._model.token_losses(states, bias, targets, table)

    def _fuse_text(self, text_hidden: Tensor, chosen: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        return self._model.fuse(
            self.image_hidden,
            text_hidden,
            self.text.mask,
            chosen=chosen,
            attention_mask=attention_mask,
            text_expert=self._text_expert,
        )

    def _check(self, name: str) -> None:
        if name not in self._allowed:
            raise UserError(f"an objective asks for the pass {name!r} without naming it in `passes`")
