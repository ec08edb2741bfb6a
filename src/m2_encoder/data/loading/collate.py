"""Samples to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m2_encoder.data.loading.pixel_rows import join_rows
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.data.samples.sample import Column, Sample
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, ImageTextBatch


def collate_samples(
    samples: list[Sample],
    *,
    tokenizer: SentencePieceTokenizer,
    masking: BatchMasking | None = None,
    columns: Mapping[str, Column] | None = None,
) -> ImageTextBatch:
    """Stack samples to a batch; texts are padded to the longest.

    Raises:
        UserError: if the values of a column make no tensor with a row for each.
    """
    captions = [caption for sample in samples for caption in sample.captions]
    texts = [caption.text for caption in captions]
    masked = None
    if masking is not None and masking.hides_words:
        draws = [(*sample.draw, number) for sample in samples for number in range(len(sample.captions))]
        text, masked = masking.mask_texts(texts, draws)
    else:
        text = tokenizer(texts)
    return ImageTextBatch(
        images=stack_images([sample.image for sample in samples]),
        text=text,
        language=torch.tensor([LANGUAGES.index(caption.language) for caption in captions]),
        identity=torch.tensor([sample.identity for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
        masked_text=masked,
        patch_mask=None if masking is None else masking.mask_images([sample.draw for sample in samples]),
        extra={name: _collate_column(name, column, samples) for name, column in (columns or {}).items()},
    )


def _collate_column(name: str, column: Column, samples: Sequence[Sample]) -> Tensor:
    values = [sample.columns[name] for sample in samples]
    if column.per_caption:
        values = [value for own in values for value in own]
    count = sum(len(sample.captions) for sample in samples) if column.per_caption else len(samples)
    try:
        tensor = column.collate(values)
        if len(tensor) != count:
            raise ValueError(f"{len(tensor)} rows for {count} {'captions' if column.per_caption else 'images'}")
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"its values make no tensor: {error}", key=f"data.columns.{name}") from error
    return tensor


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """(B, 3, S, S) of B images, in their memory layout: reordering channels would take seven times as long.

    Images that lie one behind the other are not copied.
    """
    joined = join_rows(images)
    if joined is not None:
        return joined
    if all(image.permute(1, 2, 0).is_contiguous() for image in images):
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))
