"""The model's passes over one piece of a batch, as objectives ask for them; each is run at most once.

The backbone encodes image and text alone; the vision-language layers then see both. So captions with hidden words cost
one more pass of the text backbone, and meet hidden states of the image that the contrastive loss has computed anyway.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
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
    """The passes of the model over one piece of a batch; each is run when it is first asked for, and once.

    `masked_text`, `masked_image` and `caption` give hidden states after the vision-language layers, which see image and
    text together: those of the tokens to be predicted, row by row. No others are computed to the end. Captions of one
    image share its backbone pass.

    Args:
        model: whole or sharded.
        batch: the rows of the piece.
        allowed: names of `base.PASSES` that the objectives of the run declare.
        text_expert: send texts through the text experts of the vision-language layers where image and text meet;
            otherwise through the vision experts, which serve both modalities in the released features.
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
        """The clean captions, trimmed to the longest, (k * b, T)."""
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
        """The clean passes with their features; only for objectives that need features."""
        return EncodedPair(
            self.image_hidden, self.text_hidden, self.text, self.image_heads.features, self.text_heads.features
        )

    @cached_property
    def patch_features(self) -> Tensor:
        """Clean patches in the space of the features, not normalised, (b, patches, E), without a gradient."""
        hidden = self.image_hidden  # with its graph, which others will use
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
        """Captions with hidden words beside their clean image: states of the M hidden tokens, (M, D)."""
        self._check("masked_text")
        hidden = self.hidden_tokens
        assert self.batch.masked_text is not None
        masked = TextTokens(self.batch.masked_text.ids[:, : hidden.shape[1]], self.text.mask)
        return self._fuse_text(self._model.encode_text_backbone(masked), hidden)

    @cached_property
    def caption(self) -> Tensor:
        """Captions beside their image, read from left to right: states of the M tokens with a next one, (M, D)."""
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
        """Images with hidden patches beside their clean captions.

        Args:
            patch_mask: True where a patch is hidden, (b, patches) bool.

        Returns:
            States of the M hidden patches, once for each caption, (M, D).
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
        """Cross-entropy of tokens, never holding the logits of all of them.

        Args:
            states: what is compared with the rows of the table, (M, D).
            bias: of each token, (V,).
            targets: true ids, (M,) int64.
            table: (V, D); None for the model's token table.

        Returns:
            Losses, (M,) fp32 or wider, and whether the target scored highest, (M,) bool.
        """
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
    """Images and captions of one piece in the vision-language layers, rightly and wrongly paired.

    Each gives the state of the caption's first token, which sees the whole image and the whole caption, (k * b, D).

    Args:
        model: whole or sharded.
        passes: the clean passes of the piece.
        wrong: hard negatives of the piece's captions; `image_rows` is not looked at.
        wrong_image_hidden: of the backbone, one image per caption, (k * b, N, D).
        text_expert: as in `PiecePasses`.

    Attributes:
        has_text: see `HardPairs`, (k * b,) bool.
        has_image: see `HardPairs`, (k * b,) bool.
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
        """Every caption's image beside a wrong caption; meaningless where there is none."""
        text = self._model.trim_text(self._wrong_text)
        return self._fuse(self._passes.image_hidden, self._model.encode_text_backbone(text), text)

    @cached_property
    def wrong_image(self) -> Tensor:
        """Every caption beside a wrong image; meaningless where there is none."""
        return self._fuse(self._wrong_image_hidden, self._passes.text_hidden, self._passes.text)

    def _fuse(self, image_hidden: Tensor, text_hidden: Tensor, text: TextTokens) -> Tensor:
        return self._model.fuse(image_hidden, text_hidden, text.mask, text_expert=self._text_expert)
