"""What masked objectives predict on every set, with own captions and with those of other images.

Masks depend on a fixed key and the place in the set, so they are the same before and after training. Every hidden word
becomes the mask token, so none can be copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from m2_encoder.data.masking.text_masking import MaskVocabulary
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.masked import NOTHING, Evaluated, MaskedResults, hidden_tokens, measure_masked, next_tokens
from m2_encoder.evaluation.tables import ResultRow, ResultTable
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalObjective, LocalTerms, active
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.patch_targets import NormalizedPixels, VisualCodes, normalized_patches
from m2_encoder.types import LANGUAGES, ImageTextBatch, MaskedText, TextTokens

ORDER: Final = ("zh", "en")
"""Order of the captions of an image, the first one of each language; a language's place is in the key of its masks."""

_KINDS: Final = (MaskedImage, MaskedLanguage, Captioning)
_KEY: Final = 2024  # of the masks
_BATCH_SIZE: Final = 64  # images
_SHOWN: Final = {
    "accuracy": ("accuracy", "other_accuracy", "commonest_accuracy"),
    "loss": ("loss", "other_loss", "mean_loss"),
}
"""Columns of the table: with the own partner, with another one, without looking."""


class Masked(EvaluationTask):
    """Masked language, masked image and captioning objectives, measured as `evaluation.masked` describes.

    Masked images with normalised pixels also have `mean_loss`: the loss of answering the mean of each hidden patch,
    which is 1, or 0 for a patch of one colour.
    """

    def applies(self, context: EvaluationContext) -> bool:
        """Runs in which such an objective is active."""
        return super().applies(context) and bool(choose_objectives(context, *_KINDS))

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Accuracies and losses; `masked` of `summary.json` has them by split and objective."""
        results = self.measure_sets(context)
        metrics = {
            context.metric(split, language, f"{objective}_{key}"): float(value)
            for split, objectives in results.items()
            for objective, languages in objectives.items()
            for language, numbers in languages.items()
            for key, value in numbers.items()
            if key != "count" and value is not None
        }
        if not results:
            return TaskResult(metrics)
        return TaskResult(metrics, rows=[masked_table(results)], record={"masked": results})

    def measure_sets(self, context: EvaluationContext) -> dict[str, MaskedResults]:
        """Results by split; leaves objectives in evaluation mode on the model's device."""
        model, measured = context.encoder, choose_objectives(context, *_KINDS)
        found = {}
        with evaluation_mode(model) as device:
            for objective in measured.values():
                objective.to(device).eval()
            for split, dataset in context.sets.items():
                merged: MaskedResults = {}
                for languages, rows in _group_captions(dataset):
                    part = measure_masked(
                        make_batch(context, dataset, rows, languages),
                        lambda own, other: _evaluate(model, measured, own, other),
                        batch_size=_BATCH_SIZE,
                    )
                    for name, by_language in part.items():
                        merged.setdefault(name, {}).update(by_language)
                found[split] = merged
        return found


def _group_captions(dataset: RetrievalSet) -> list[tuple[tuple[str, ...], Sequence[int]]]:
    """Languages that are measured together and the images with all of them; each apart where some images lack one."""
    everything = range(len(dataset.keys))
    rows = {name: [row for row in everything if dataset.captions_of(row, name)] for name in dataset.languages}
    if all(len(found) == len(everything) for found in rows.values()):
        return [(dataset.languages, everything)]
    return [((name,), found) for name, found in rows.items()]


def choose_objectives(context: EvaluationContext, *kinds: type[LocalObjective]) -> dict[str, LocalObjective]:
    """Active objectives of some classes, by name."""
    return {name: o for name, o in active(context.objectives).items() if isinstance(o, kinds)}


def masked_table(results: Mapping[str, MaskedResults]) -> ResultTable:
    """Per split a row for each objective and language: accuracies in percent, or losses."""
    rows = [
        ResultRow(split, _cells(name, language, numbers))
        for split, objectives in results.items()
        for name, languages in objectives.items()
        for language, numbers in languages.items()
    ]
    headings = ("objective", "\n", "measure", "right\npartner", "another's", "\nblind", "\nterms")
    caption = "blind: always the commonest token or code, or each patch's mean"
    return ResultTable("Hidden words and patches", headings, rows, num_labels=3, caption=caption)


def _cells(objective: str, language: str, numbers: Mapping[str, float | int | None]) -> list[str]:
    is_share = "accuracy" in numbers
    shown = [numbers.get(key) for key in _SHOWN["accuracy" if is_share else "loss"]]
    cells = ["–" if value is None else f"{100 * value:.1f}" if is_share else f"{value:.3f}" for value in shown]
    return [objective, language, "% right" if is_share else "loss", *cells, f"{numbers['count']:,}"]


def make_batch(
    context: EvaluationContext, dataset: RetrievalSet, rows: Sequence[int], languages: Sequence[str] = ORDER
) -> ImageTextBatch:
    """Rows of a set with their first caption in each of some languages, on the CPU.

    `context.masking` hides words and patches.
    """
    texts = [dataset.captions_of(row, language)[0] for row in rows for language in languages]
    tokenizer, masking = context.tokenizer, context.masking
    text, masked, patches = tokenizer(texts), None, None
    if masking is not None:
        patches = masking.mask_images([(_KEY, row) for row in rows])
        if masking.hides_words:
            draws = [(_KEY, row, ORDER.index(language)) for row in rows for language in languages]
            text, drawn = masking.mask_texts(texts, draws)
            mask_id = MaskVocabulary.of(tokenizer).mask_id
            masked = MaskedText(text.ids.masked_fill(drawn.predicted, mask_id), drawn.predicted)
    keys = tuple(dataset.keys[row] for row in rows)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return ImageTextBatch(
        # Not copied for a whole set, which may take gigabytes.
        images=dataset.images if list(rows) == list(range(len(dataset.keys))) else dataset.images[list(rows)],
        text=text,
        language=torch.tensor([LANGUAGES.index(language) for _ in rows for language in languages]),
        identity=torch.tensor([numbers[key] for key in keys]),
        keys=keys,
        sources=(dataset.name,) * len(keys),
        masked_text=masked,
        patch_mask=patches,
    )


def make_passes(model: M2Encoder, batch: ImageTextBatch, objectives: Mapping[str, LocalObjective]) -> PiecePasses:
    """The passes that objectives need, on the model's device."""
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


def _evaluate(
    model: M2Encoder, objectives: Mapping[str, LocalObjective], own: ImageTextBatch, other: ImageTextBatch | None
) -> Evaluated:
    """Terms of images with their own captions and with other ones, and the true targets."""
    passes = make_passes(model, own, objectives)
    terms = {name: _add_blind(objective, passes, objective.terms(passes)) for name, objective in objectives.items()}
    targets = _list_targets(objectives, own, passes)
    if other is None:
        return Evaluated(terms, None, targets)
    beside = make_passes(model, other, objectives)
    beside.image_hidden = passes.image_hidden  # the images are the same
    if any(isinstance(objective, MaskedImage) and objective.patch_ratio is None for objective in objectives.values()):
        beside.pair = passes.pair  # both times attentive masks hide what the own captions describe
    return Evaluated(terms, {name: objective.terms(beside) for name, objective in objectives.items()}, targets)


def _add_blind(objective: LocalObjective, passes: PiecePasses, terms: LocalTerms) -> LocalTerms:
    """Adds `mean_loss`, of answering the mean of every hidden patch, where pixels are predicted."""
    if not isinstance(objective, MaskedImage) or not isinstance(objective.targets, NormalizedPixels):
        return terms
    mask, images = objective.choose(passes), passes.batch.images
    patch_size = images.shape[-1] // round(mask.shape[1] ** 0.5)
    errors = normalized_patches(images, patch_size).square().mean(dim=-1)
    by_image = torch.where(mask, errors, 0).sum(dim=1)
    repeated = by_image.repeat_interleave(passes.batch.captions_per_image)
    return terms._replace(scores={**terms.scores, "mean_loss": repeated})


def _list_targets(
    objectives: Mapping[str, LocalObjective], batch: ImageTextBatch, passes: PiecePasses
) -> dict[str, Tensor]:
    """True tokens or codes of objectives that predict them."""
    found = {}
    for name, objective in objectives.items():
        if isinstance(objective, MaskedLanguage):
            found[name] = hidden_tokens(batch)
        elif isinstance(objective, Captioning):
            found[name] = next_tokens(batch)
        elif isinstance(objective, MaskedImage) and isinstance(objective.targets, VisualCodes):
            codes = objective.targets.encode(passes.batch.images).masked_fill(~objective.choose(passes), NOTHING)
            found[name] = codes.repeat_interleave(batch.captions_per_image, dim=0)
    return found
