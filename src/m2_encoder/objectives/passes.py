"""Passes of the model over one piece (micro-batch) of a batch, run when an objective first reads them.

The backbone encodes image and text apart; the vision-language layers then see both. Passes share backbone states:
captions with hidden words cost one more pass of the text backbone, none of the image backbone.

*Hidden* words and patches are those that the model may not see; names in `_hidden` are of hidden states.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.mixture import RouterOutput, Routing
from m2_encoder.types import HeadFeatures, ImageTextBatch, TextTokens

if TYPE_CHECKING:  # objectives load no model
    from m2_encoder.models.m2_encoder import M2Encoder


class EncodedPair(NamedTuple):
    """A piece's images and captions, each encoded alone."""

    image_hidden: Tensor  # of the backbone, (b, N, D); token 0 is cls, then the patches row by row
    text_hidden: Tensor  # of the backbone, (k * b, T, D); meaningless on padding
    text: TextTokens  # the captions, trimmed, (k * b, T)
    image_features: Tensor  # (b, E), L2-normalised
    text_features: Tensor  # (k * b, E), L2-normalised


class HardPairs(NamedTuple):
    """Hard negatives, one of each kind per caption of a rank."""

    text: TextTokens  # captions that do not describe the caption's image, (k * B, T)
    has_text: Tensor  # False where the group had none, (k * B,) bool
    image_rows: Tensor  # images of this rank that the caption does not describe, (k * B,) int64 in 0..B-1
    has_image: Tensor  # False where the rank had none, (k * B,) bool


class PiecePasses:
    """The passes of the model over one piece of a batch; each runs once, when it is first read.

    `image_routing` and `text_routing` are what the routers of mixtures said in those of the images and of the clean
    captions. `masked_text`, `masked_image` and `caption` return states after the vision-language layers, where image
    and text see each other: those of the tokens to be predicted, row by row. The last layer computes no others.

    Args:
        model: whole or sharded.
        batch: the rows of the piece.
        allowed: which of these three passes, and "routing", the objectives of the run declare in
            `LocalObjective.passes`.
        text_expert: see `TermObjective`.
    """

    def __init__(
        self, model: M2Encoder, batch: ImageTextBatch, *, allowed: frozenset[str], text_expert: bool = False
    ) -> None:
        self._model = model
        self._allowed = allowed
        self._text_expert = text_expert
        self._masked_images: list[tuple[Tensor, Tensor]] = []  # masks, and states for them
        self._routing = {kind: Routing() for kind in ("image", "text") if "routing" in allowed}
        self.batch = batch

    @cached_property
    def text(self) -> TextTokens:
        """The clean captions, trimmed to the longest, (k * b, T)."""
        return self._model.trim_text(self.batch.text)

    @cached_property
    def image_hidden(self) -> Tensor:
        """Of the backbone, (b, N, D)."""
        return self._model.encode_image_backbone(self.batch.images, routing=self._routing.get("image"))

    @cached_property
    def text_hidden(self) -> Tensor:
        """Of the backbone, (k * b, T, D)."""
        return self._model.encode_text_backbone(self.text, routing=self._routing.get("text"))

    @cached_property
    def image_routing(self) -> list[RouterOutput]:
        """Of the images' tokens, by layer with a mixture; (b, N, …)."""
        self._check("routing")
        assert self.image_hidden is not None, "the pass itself"
        return self._routing["image"].take()

    @cached_property
    def text_routing(self) -> list[RouterOutput]:
        """Of the clean captions' tokens, by layer with a mixture; (k * b, T, …), meaningless on padding."""
        self._check("routing")
        assert self.text_hidden is not None, "the pass itself"
        return self._routing["text"].take()

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
        """The passes of clean images and captions, with their features."""
        return EncodedPair(
            self.image_hidden, self.text_hidden, self.text, self.image_heads.features, self.text_heads.features
        )

    @cached_property
    def patch_features(self) -> Tensor:
        """Clean patches in the space of the features, not normalised, (b, patches, E), without a gradient."""
        hidden = self.image_hidden  # outside of no_grad: other passes need its graph
        with torch.no_grad():
            return self._model.finish_patches(hidden)

    @cached_property
    def hidden_tokens(self) -> Tensor:
        """True on tokens of the captions that are to be predicted, (k * b, T) bool."""
        if self.batch.masked_text is None:
            raise UserError("an objective predicts hidden words, but the batch has none; set data masking up for it")
        return self.batch.masked_text.predicted[:, : self.text.ids.shape[1]]

    @cached_property
    def masked_text(self) -> Tensor:
        """States of the M hidden tokens, (M, D), of captions with hidden words beside their clean image."""
        self._check("masked_text")
        hidden = self.hidden_tokens
        assert self.batch.masked_text is not None
        masked = TextTokens(self.batch.masked_text.ids[:, : hidden.shape[1]], self.text.mask)
        return self._fuse_text(self._model.encode_text_backbone(masked), hidden)

    @cached_property
    def caption(self) -> Tensor:
        """States of the M tokens that have a next one, (M, D), of causally masked captions beside their image."""
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
        """States of the M hidden patches, (M, D), of images with hidden patches beside each of their clean captions.

        Args:
            patch_mask: True where a patch is hidden, (b, patches) bool.
        """
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
            selected=functional.pad(patches, (1, 0)),  # cls is never hidden
            select_from="image",
            text_expert=self._text_expert,
        )
        self._masked_images.append((patch_mask, states))
        return states

    def token_losses(
        self, states: Tensor, bias: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy against a table, (V, D), or the model's token table; see `M2Encoder.token_losses`."""
        return self._model.token_losses(states, bias, targets, table)

    def _fuse_text(self, text_hidden: Tensor, selected: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        return self._model.fuse(
            self.image_hidden,
            text_hidden,
            self.text.mask,
            selected=selected,
            attention_mask=attention_mask,
            text_expert=self._text_expert,
        )

    def _check(self, name: str) -> None:
        if name not in self._allowed:
            raise UserError(f"an objective asks for the pass {name!r} without naming it in `passes`")


class PiecePairs:
    """Right and wrong pairs of one piece, after the vision-language layers.

    `matched`, `wrong_text` and `wrong_image` are states of the captions' first tokens, (k * b, D): one token that sees
    the whole image and the whole caption.

    Args:
        model: whole or sharded.
        passes: the passes of clean images and captions of the piece.
        wrong: hard negatives of the piece's captions; `image_rows` is not used.
        wrong_image_hidden: backbone states of one wrong image per caption, (k * b, N, D).
        text_expert: see `TermObjective`.
    """

    def __init__(
        self, model: M2Encoder, passes: PiecePasses, wrong: HardPairs, wrong_image_hidden: Tensor, *, text_expert: bool
    ) -> None:
        self._model = model
        self._passes = passes
        self._wrong_text = wrong.text
        self._wrong_image_hidden = wrong_image_hidden
        self._text_expert = text_expert
        self.has_text, self.has_image = wrong.has_text, wrong.has_image

    @cached_property
    def matched(self) -> Tensor:
        """Every caption beside its image."""
        return self._fuse(self._passes.image_hidden, self._passes.text_hidden, self._passes.text)

    @cached_property
    def wrong_text(self) -> Tensor:
        """Every caption's image beside a wrong caption; meaningless where `has_text` is False."""
        text = self._model.trim_text(self._wrong_text)
        return self._fuse(self._passes.image_hidden, self._model.encode_text_backbone(text), text)

    @cached_property
    def wrong_image(self) -> Tensor:
        """Every caption beside a wrong image; meaningless where `has_image` is False."""
        return self._fuse(self._wrong_image_hidden, self._passes.text_hidden, self._passes.text)

    def _fuse(self, image_hidden: Tensor, text_hidden: Tensor, text: TextTokens) -> Tensor:
        return self._model.fuse(image_hidden, text_hidden, text.mask, text_expert=self._text_expert)
