"""A picture of a run with masked objectives: predicted patches and predicted words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.pictures.drawing import LANGUAGE_NAMES
from m2_encoder.evaluation.pictures.masked import MaskedRow, PredictedCaption, Words, draw_masked_page
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.evaluation.tasks.masked import choose_objectives, make_batch, make_passes
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalObjective, Objective
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.patch_targets import NormalizedPixels, join_patches, split_patches
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import ImageTextBatch

PICTURE_FILE: Final = "masked.png"

_KINDS: Final = (MaskedImage, MaskedLanguage)
_ROWS: Final = 8
_SPLITS: Final = ("heldout_style", "val")
_HIDDEN_GREY: Final = 0.84
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class MaskedPicture(EvaluationTask):
    """Draws `masked.png`: some images of a reported set with predicted patches and predicted words."""

    def applies(self, context: EvaluationContext) -> bool:
        """Runs in which an objective with hidden words or patches is active, and that have a set."""
        return super().applies(context) and bool(choose_objectives(context, *_KINDS)) and bool(context.sets)

    def measure(self, context: EvaluationContext) -> TaskResult:
        """No metrics, only the picture."""
        return TaskResult({}, pictures={PICTURE_FILE: lambda path: draw_masked(path, context)})


def draw_masked(path: Path, context: EvaluationContext) -> None:
    """Draws what masked objectives predict on some images of a set."""
    masked, model, run = choose_objectives(context, *_KINDS), context.encoder, context.run
    preferred = [name for split in _SPLITS for name, found in context.sets.items() if found.split == split]
    split = [*preferred, *context.sets][0]
    dataset = context.sets[split]
    languages, chosen = choose_rows(dataset)
    with evaluation_mode(model):
        batch = make_batch(context, dataset, chosen, languages)
        pictures, predicted = _predict(make_passes(model, batch, masked), masked, model, languages)
    captions = [dataset.captions_of(item, language)[0] for item in chosen for language in languages]
    told = [_tell(batch, predicted, row, caption, context.tokenizer) for row, caption in enumerate(captions)]
    rows = [
        MaskedRow(
            pictures={column: images[row].cpu() for column, images in pictures.items()},
            captions=dict(zip(languages, told[row * len(languages) :], strict=False)),
        )
        for row in range(len(chosen))
    ]
    draw_masked_page(
        path,
        rows,
        title="Hidden patches and hidden words",
        subtitle=f"run {run.name}, {run.steps or 0:,} steps, objectives {', '.join(context.objectives)}",
        note=f"{context.titles[split]}, chosen without looking at results{_caveat(masked)}",
    )


def _caveat(objectives: Mapping[str, Objective]) -> str:
    """What the predicted patches take from the true image."""
    targets = [objective.targets for objective in objectives.values() if isinstance(objective, MaskedImage)]
    shows_pixels = any(isinstance(target, NormalizedPixels) for target in targets)
    return "; mean and contrast of each hidden patch are the true ones" if shows_pixels else ""


def choose_rows(dataset: RetrievalSet, number: int = _ROWS) -> tuple[tuple[str, ...], list[int]]:
    """Languages, and at most `number` images with captions in them, at even distances.

    If no image has captions in all languages of the set, those of the first one. If there are enough, only images with
    several words in English and several characters in Chinese.
    """
    languages = dataset.languages
    usable = _with_captions(dataset, languages)
    if not usable:
        languages = languages[:1]
        usable = _with_captions(dataset, languages)
    wordy = [row for row in usable if all(_is_wordy(dataset.captions_of(row, name)[0], name) for name in languages)]
    candidates = wordy if len(wordy) >= number else usable
    return languages, candidates[:: max(1, len(candidates) // number)][:number]


def _with_captions(dataset: RetrievalSet, languages: Sequence[str]) -> list[int]:
    rows = range(len(dataset.keys))
    return [row for row in rows if all(dataset.captions_of(row, language) for language in languages)]


def _is_wordy(caption: str, language: str) -> bool:
    return len(caption) > 2 if language == "zh" else len(caption.split()) > 1


def _predict(
    passes: PiecePasses, objectives: Mapping[str, LocalObjective], model: M2Encoder, languages: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Pictures by column, and captions with predicted tokens, (k * b, T), if words were hidden."""
    pictures: dict[str, Tensor] = {"original": passes.batch.images}
    predicted: Tensor | None = None
    for objective in objectives.values():
        objective.to(model.logit_scale.device).eval()
        if isinstance(objective, MaskedImage):
            pictures |= draw_patches(objective, passes, model.config.patch_size, languages)
        elif isinstance(objective, MaskedLanguage):
            predicted = objective.predict(passes, model.text_embed.tokens.weight).cpu()
    return pictures, predicted


def draw_patches(
    objective: MaskedImage, passes: PiecePasses, patch_size: int, languages: Sequence[str]
) -> dict[str, Tensor]:
    """Images with hidden patches, and as predicted with each caption, by column; (b, 3, S, S) uint8 each."""
    mask, images, captions = objective.choose(passes), passes.batch.images, len(languages)
    patches = split_patches(images, patch_size).masked_fill(mask[..., None], _HIDDEN_GREY)
    drawn = objective.targets.draw(
        passes.masked_image(mask), images.repeat_interleave(captions, 0), mask.repeat_interleave(captions, 0)
    )
    found = {"hidden": _to_uint8(join_patches(patches, patch_size))}
    for place, language in enumerate(languages):
        found[f"with {LANGUAGE_NAMES[language]}"] = _to_uint8(drawn[place::captions])
    return found


def _tell(
    batch: ImageTextBatch, predicted: Tensor | None, row: int, caption: str, tokenizer: SentencePieceTokenizer
) -> PredictedCaption:
    """A caption with predictions in place of hidden words; neighbouring hidden words are joined."""
    if predicted is None or batch.masked_text is None:
        return PredictedCaption(caption, ())
    length = min(int(batch.text.mask[row].sum()), predicted.shape[1])
    true = batch.text.ids[row, :length].tolist()
    hidden = batch.masked_text.predicted[row, :length].tolist()
    said = predicted[row, :length].tolist()
    words: list[Words] = []
    for place in range(length):
        if true[place] in (tokenizer.cls_id, tokenizer.end_id):
            continue
        is_right = said[place] == true[place] if hidden[place] else None
        piece = tokenizer.pieces([said[place] if hidden[place] else true[place]])[0].replace("▁", " ")
        if words and (words[-1].is_right is None) == (is_right is None):
            both = None if is_right is None else bool(words[-1].is_right and is_right)
            words[-1] = Words(words[-1].text + piece, both)
        else:
            words.append(Words(piece if words else piece.lstrip(), is_right))
    return PredictedCaption(caption, tuple(Words(spell_bytes(word.text), word.is_right) for word in words))


def spell_bytes(text: str) -> str:
    """Replaces runs of byte pieces (<0xE7><0xBB><0x83>) by their characters; ? for invalid bytes."""

    def spell(run: re.Match[str]) -> str:
        values = bytes(int(value, 16) for value in _BYTE.findall(run[0]))
        return re.sub("\N{REPLACEMENT CHARACTER}+", "?", values.decode(errors="replace"))

    return re.sub(rf"(?:{_BYTE.pattern})+", spell, text)


def _to_uint8(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)
