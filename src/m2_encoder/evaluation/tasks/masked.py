"""What the masked objectives of a run predict on its sets: measured, under the names of the loggers, and as a table."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from m2_encoder.config.model_choice import build_tokenizer
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.console_tables import start_table
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.masked import NOTHING, Evaluated, MaskedResults, hidden_tokens, measure_masked, next_tokens
from m2_encoder.evaluation.tasks.masked_batches import make_batch, make_passes
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import LocalObjective, LocalTerms, Objective
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.patch_targets import NormalizedPixels, VisualCodes, normalized_patches
from m2_encoder.types import ImageTextBatch

_BATCH_SIZE = 64  # images
_TITLE_WIDTH = 18  # of a line of a split's title: the table must fit a terminal of 80 columns
_SHOWN = {
    "accuracy": ("accuracy", "other_accuracy", "commonest_accuracy"),
    "loss": ("loss", "other_loss", "mean_loss"),
}
"""What a row of the table shows: with the right partner, with a wrong one, without looking."""


def measure_sets(
    sets: Mapping[str, RetrievalSet],
    *,
    model: M2Encoder,
    objectives: Mapping[str, Objective],
    cfg: Mapping[str, Any],
) -> dict[str, MaskedResults]:
    """Measures masked language, masked image and captioning objectives as `m2_encoder.evaluation.masked` says.

    Masked images with normalised pixels have `mean_loss`, too: the loss of answering each hidden patch's mean, which is
    1 but for patches of one colour, where it is 0.

    Args:
        sets: by split, images at the model's size.
        model: trained, on any device.
        objectives: of the run, with their heads; left in evaluation mode on the model's device.
        cfg: the resolved configuration of the run.

    Returns:
        By split and objective; empty where no such objective counted.
    """
    measured: dict[str, LocalObjective] = {
        name: objective
        for name, objective in objectives.items()
        if objective.weight > 0 and isinstance(objective, MaskedImage | MaskedLanguage | Captioning)
    }
    if not measured:
        return {}
    tokenizer = build_tokenizer(cfg["model"], model.config)
    found = {}
    with evaluation_mode(model) as device:
        for objective in measured.values():
            objective.to(device).eval()
        for split, dataset in sets.items():
            rows = range(len(dataset.keys))
            batch = make_batch(dataset, rows, objectives=measured, tokenizer=tokenizer, model=model)
            found[split] = measure_masked(
                batch,
                lambda own, other: _evaluate(model, measured, own, other),
                batch_size=_BATCH_SIZE,
            )
    return found


def masked_metrics(results: Mapping[str, MaskedResults], sets: Mapping[str, RetrievalSet]) -> dict[str, float]:
    """Numbers under the names of the loggers: `val/<set>_<language>/cmlm_accuracy`, shares as in training.

    Args:
        results: by split.
        sets: by split.
    """
    return {
        f"val/{sets[split].name}_{language}/{objective}_{key}": float(value)
        for split, objectives in results.items()
        for objective, languages in objectives.items()
        for language, numbers in languages.items()
        for key, value in numbers.items()
        if key != "count" and value is not None
    }


def masked_table(
    results: Mapping[str, MaskedResults], *, titles: Mapping[str, str], num_images: Mapping[str, int]
) -> Table:
    """Per split a row for each objective and language: accuracies in percent, losses of patches as they are.

    Args:
        results: by split.
        titles: what a split is called; its name where there is none.
        num_images: by split.
    """
    caption = "blind: always the commonest token or code, or each patch's mean"
    table = start_table("Hidden words and patches", caption=caption)
    table.add_column("\nobjective")
    table.add_column("\n")
    table.add_column("\nmeasure")
    for heading in ("right\npartner", "another's", "\nblind", "\nterms"):
        table.add_column(heading if "\n" in heading else f"\n{heading}", justify="right")
    for split, objectives in results.items():
        lines = textwrap.wrap(titles.get(split, split), _TITLE_WIDTH)
        notes = [*(Text(line, style="bold") for line in lines), Text(f"{num_images[split]:,} images", style="dim")]
        rows = [_make_row(name, code, numbers) for name, of in objectives.items() for code, numbers in of.items()]
        for note, row in itertools.zip_longest(notes, rows):
            table.add_row(note, *(row or []))
        table.add_section()
    return table


def _make_row(objective: str, language: str, numbers: Mapping[str, float | int | None]) -> list[str]:
    is_share = "accuracy" in numbers
    shown = [numbers.get(key) for key in _SHOWN["accuracy" if is_share else "loss"]]
    cells = ["–" if value is None else f"{100 * value:.1f}" if is_share else f"{value:.3f}" for value in shown]
    return [objective, language, "% right" if is_share else "loss", *cells, f"{numbers['count']:,}"]


def _evaluate(
    model: M2Encoder,
    objectives: Mapping[str, LocalObjective],
    own: ImageTextBatch,
    other: ImageTextBatch | None,
) -> Evaluated:
    """Terms with the images' own captions and with other ones, and what is true."""
    passes = make_passes(model, own, objectives)
    terms = {name: _add_blind(objective, passes, objective.terms(passes)) for name, objective in objectives.items()}
    targets = _list_targets(objectives, own, passes)
    if other is None:
        return Evaluated(terms, None, targets)
    beside = make_passes(model, other, objectives)
    beside.image_hidden = passes.image_hidden  # the images are the same
    if any(isinstance(objective, MaskedImage) and objective.patch_ratio is None for objective in objectives.values()):
        beside.pair = passes.pair  # attentive masks hide what the right captions speak of, both times
    return Evaluated(terms, {name: objective.terms(beside) for name, objective in objectives.items()}, targets)


def _add_blind(objective: LocalObjective, passes: PiecePasses, terms: LocalTerms) -> LocalTerms:
    """With the loss of answering the mean of every hidden patch, where pixels are predicted."""
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
