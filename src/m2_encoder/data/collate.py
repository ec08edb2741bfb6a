"""Samples to batches."""

from __future__ import annotations

import torch

from m2_encoder.data.stream import TrainingSample
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, ImageTextBatch


def collate_samples(samples: list[TrainingSample], *, tokenizer: SentencePieceTokenizer) -> ImageTextBatch:
    """Stack samples to a batch; texts are padded to the longest."""
    captions = [caption for sample in samples for caption in sample.captions]
    return ImageTextBatch(
        images=torch.stack([sample.image for sample in samples]),
        text=tokenizer([caption.text for caption in captions]),
        language=torch.tensor([LANGUAGES.index(caption.language) for caption in captions]),
        identity=torch.tensor([sample.identity for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
    )
