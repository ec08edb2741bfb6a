"""Containers passed between data, models and objectives.

Letters in shapes, everywhere in this package::

    B local batch · G ranks in a contrastive group · W world size · N image tokens · T text tokens
    D width · H heads · E feature dim · V vocabulary · S image side in pixels · P patch side in pixels

They are NamedTuples because Lightning moves those to a device; it cannot do so with frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

LANGUAGES = ("en", "zh")
"""Caption languages; a batch stores indices into this tuple."""


class TextTokens(NamedTuple):
    """A batch of tokenized texts, padded on the right."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # True on tokens, False on padding, (B, T) bool


class MaskedText(NamedTuple):
    """Captions with hidden words."""

    ids: Tensor  # of the text, some replaced, (B, T) int64
    # where ids are to be predicted, (B, T) bool; never on special tokens or padding. Some of these keep their true id.
    predicted: Tensor


class ImageTextBatch(NamedTuple):
    """Pairs of images and captions, as a DataModule yields them.

    Every field has a row per image, B, or a row per caption, k * B; those of an image follow each other.

    Attributes:
        images: (B, 3, S, S), uint8 in 0..255 or floating in 0..1; normalisation is the model's.
        text: k captions per image, (k * B, T); row j describes image j // k. Usually k is 1.
        language: index into `LANGUAGES` of each caption, (k * B,) int64.
        identity: equal numbers mark the same content (the same picture, or the same concept drawn twice), (B,) int64.
        keys: sample keys, length B.
        sources: name of the mixture part each sample comes from, length B.
        masked_text: the captions with hidden words, (k * B, T); None if no objective asks for them.
        patch_mask: True where a patch is hidden, (B, patches) bool, row by row; None if no objective asks for it.
        extra: the user's own columns by name, (B, ...) or (k * B, ...) each; see `data.samples.sample.Column`.
    """

    images: Tensor
    text: TextTokens
    language: Tensor
    identity: Tensor
    keys: tuple[str, ...]
    sources: tuple[str, ...]
    masked_text: MaskedText | None = None
    patch_mask: Tensor | None = None
    extra: Mapping[str, Tensor] = {}

    @property
    def captions_per_image(self) -> int:
        """How many captions each image has, k."""
        return self.text.ids.shape[0] // max(1, self.images.shape[0])

    def rows(self, images: slice) -> ImageTextBatch:
        """Some of the images, in order, with all that belongs to them; shares memory with the whole batch."""
        total = len(self.images)
        start, stop, _ = images.indices(total)

        def cut(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, Mapping):
                return {name: cut(part) for name, part in value.items()}
            if hasattr(value, "_fields"):
                return type(value)(*map(cut, value))
            per_image = len(value) // max(1, total)
            return value[start * per_image : stop * per_image]

        return ImageTextBatch(*map(cut, self))


class RetrievalBatch(NamedTuple):
    """Some images and some captions of a set, for validation; they need not belong together.

    A side of which this rank has nothing left holds one row without a number, which is encoded and not measured.
    """

    images: Tensor  # (B, 3, S, S), uint8 or floating
    identity: Tensor  # equal numbers mark the same content, (B,) int64; (0,) where there is no own image
    texts: dict[str, TextTokens]  # by language, (M, T)
    text_identity: dict[str, Tensor]  # of the texts, (M,) int64; (0,) where there is no own text


class HeadFeatures(NamedTuple):
    """One modality's features, L2-normalised."""

    features: Tensor  # of the vision-language head, (B, E): the embedding of M2-Encoder
    backbone_features: Tensor | None  # of the head on the backbone, (B, E); None if not requested


class EncoderOutput(NamedTuple):
    """Outputs of both encoders for one modality."""

    features: Tensor  # of the vision-language head, L2-normalised, (B, E): the embedding of M2-Encoder
    backbone_features: Tensor  # of the head on the backbone, L2-normalised, (B, E)
    hidden: Tensor  # after the vision-language layers, (B, N or T, D)
    backbone_hidden: Tensor  # after the backbone, (B, N or T, D)


class FusionOutput(NamedTuple):
    """Image and text encoded as one sequence, image tokens first."""

    hidden: Tensor  # after the vision-language layers, (B, N + T, D)
    backbone_hidden: Tensor  # after the backbone, (B, N + T, D)
    mask: Tensor  # True on image and text tokens, (B, N + T) bool
    num_image_tokens: int  # N; text starts there


@runtime_checkable
class ContrastiveTopology(Protocol):
    """A strategy with contrastive groups and batch accumulation."""

    @property
    def contrastive_group(self) -> dist.ProcessGroup | None:
        """Process group that holds this rank; None for a group of one."""
        ...

    @property
    def micro_batches(self) -> int:
        """Number of pieces in which a rank's rows are encoded, with one loss over all of them."""
        ...

    @property
    def recompute(self) -> bool:
        """Whether a micro-batch is encoded again in backward instead of keeping its activations."""
        ...
