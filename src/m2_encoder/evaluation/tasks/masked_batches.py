"""Sets as batches with hidden patches and hidden words, for looking at masked objectives and for measuring them.

Masks are drawn by a fixed key and the place in the set, before and after training the same; every hidden word is
replaced by the mask token, so that none is left for copying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from m2_encoder.data.masking.text_masking import MaskVocabulary
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalObjective
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.runs.build import build_masking
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, ImageTextBatch, MaskedText, TextTokens

ORDER: Final = ("zh", "en")
"""Languages of the captions of an image, one caption each."""

_KEY: Final = 2024  # of the masks


def make_batch(
    dataset: RetrievalSet,
    rows: Sequence[int],
    *,
    objectives: Mapping[str, LocalObjective],
    tokenizer: SentencePieceTokenizer,
    model: M2Encoder,
) -> ImageTextBatch:
    """Images with their captions, a row for each of `ORDER`, on the CPU.

    Args:
        dataset: images at the model's size.
        rows: which of it.
        objectives: say what is hidden.
        tokenizer: the model's own.
        model: whose patches are hidden.
    """
    texts = [dataset.captions[language][row] for row in rows for language in ORDER]
    masking = build_masking(objectives, tokenizer, model.config)
    text, masked, patches = tokenizer(texts), None, None
    if masking is not None:
        patches = masking.mask_images([(_KEY, row) for row in rows])
        if masking.hides_words:
            draws = [(_KEY, row, place) for row in rows for place in range(len(ORDER))]
            text, drawn = masking.mask_texts(texts, draws)
            mask_id = MaskVocabulary.of(tokenizer).mask_id
            masked = MaskedText(text.ids.masked_fill(drawn.predicted, mask_id), drawn.predicted)
    keys = tuple(dataset.keys[row] for row in rows)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return ImageTextBatch(
        # All of a set is not copied: it may take gigabytes.
        images=dataset.images if list(rows) == list(range(len(dataset.keys))) else dataset.images[list(rows)],
        text=text,
        language=torch.tensor([LANGUAGES.index(language) for _ in rows for language in ORDER]),
        identity=torch.tensor([numbers[key] for key in keys]),
        keys=keys,
        sources=(dataset.name,) * len(keys),
        masked_text=masked,
        patch_mask=patches,
    )


def make_passes(model: M2Encoder, batch: ImageTextBatch, objectives: Mapping[str, LocalObjective]) -> PiecePasses:
    """The passes that objectives ask for, on the model's device."""
    return PiecePasses(
        model,
        move_batch(batch, model.logit_scale.device),
        allowed=frozenset().union(*(objective.passes for objective in objectives.values())),
        text_expert=any(objective.text_expert for objective in objectives.values()),
    )


def move_batch(batch: ImageTextBatch, device: torch.device) -> ImageTextBatch:
    """The same on a device."""
    masked = batch.masked_text
    return batch._replace(
        images=batch.images.to(device),
        text=TextTokens(*(part.to(device) for part in batch.text)),
        masked_text=None if masked is None else MaskedText(*(part.to(device) for part in masked)),
        patch_mask=None if batch.patch_mask is None else batch.patch_mask.to(device),
    )
