"""Retrieval in both directions, with a gallery of a few queries.

The queries were chosen from the captions, before any model was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.errors import abridge_list
from m2_encoder.evaluation.pictures.drawing import LANGUAGE_NAMES
from m2_encoder.evaluation.pictures.gallery import GallerySection, draw_gallery, find_concepts, find_freely
from m2_encoder.evaluation.protocol import describe_protocol, protocol_lines
from m2_encoder.evaluation.retrieval import evaluate_features
from m2_encoder.evaluation.tables import Results, format_percent, markdown_table, results_table, tabulate
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.pictures import STANDARD

PICTURE_FILE: Final = "retrieval.png"

_STYLE_NAMES: Mapping[str, str] = {
    "noto": "Noto", "twemoji": "Twemoji", "fluent": "Fluent", "openmoji": "OpenMoji",
}  # fmt: skip
# Everyday things: an elephant, a rocket, a guitar; then concepts that training left out.
_CONCEPTS: Mapping[str, tuple[str, ...]] = {
    "heldout_style": ("1f418", "1f680", "1f3b8"),
    "heldout_families": ("1f63f", "1f68d", "1f989"),
}
_FREE_QUERIES = {"zh": ("红色的水果", "会飞的动物"), "en": ("a red fruit", "an animal that flies")}
_HEADINGS: Mapping[str, str] = {
    "heldout_style": "Known concepts in a style it has never seen",
    "heldout_families": "Concepts it has never seen, in a style it has never seen",
}
_NUM_CONCEPTS = 3
_PICTURE_SIZE_PX = 64  # smaller images would look blurred; the files are at least this large


class Retrieval(EvaluationTask):
    """Recalls of every set in every language; draws `retrieval.png`."""

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Recalls in percent, as `evaluation.metrics.retrieval_metrics` returns them."""
        results = {split: evaluate_features(features) for split, features in context.features.items()}
        return report_recalls(context, results, metrics=recall_metrics(context, results))


def recall_metrics(context: EvaluationContext, results: Results, prefix: str = "") -> dict[str, float]:
    """Recalls under their names for loggers: `val/<set>_<language>/t2i_r@10`, `prefix` before the last part."""
    return {
        context.metric(split, language, f"{prefix}{name}"): value
        for split, languages in results.items()
        for language, metrics in languages.items()
        for name, value in metrics.items()
        if "_r@" in name or name == "mean_recall"
    }


def report_recalls(
    context: EvaluationContext, results: Results, *, metrics: Mapping[str, float], lines: tuple[str, ...] = ()
) -> TaskResult:
    """Tables of recalls, `lines` below them, and the gallery; each row of `results` is one of the tables."""
    record = {"protocol": describe_protocol(context.sets), "table": tabulate(results), "evaluation": results}
    if not results:  # a run on shards alone has no sets
        return TaskResult(metrics, record=record)
    return TaskResult(
        metrics,
        rows=(results_table(results), *abridge_list(list(protocol_lines(context.sets))), *lines),
        record=record,
        markdown=markdown_table(results, context.titles),
        pictures={PICTURE_FILE: lambda path: draw_queries(path, context, results)},
    )


def draw_queries(path: Path, context: EvaluationContext, results: Results) -> None:
    """Draws what a few queries find in the sets for reporting, or in the first one."""
    reported = [name for split in _HEADINGS for name, found in context.sets.items() if found.split == split]
    shown = {split: _enlarge(split, context) for split in reported or [*results][:1]}
    sections = [_concept_section(split, dataset, context, results) for split, dataset in shown.items()]
    split, dataset = next(iter(shown.items()))
    if dataset.split:  # the questions are about its drawings
        columns = find_freely(context.feature_model, context.tokenizer, dataset, context.features[split], _FREE_QUERIES)
        number = len(dataset.keys)
        note = (
            f"the same {number:,} images as above; no caption says it like this, and no single image is the right one"
        )
        sections.append(GallerySection("Free questions", note, columns, {}, number))
    trained = f", {context.run.steps:,} steps" if context.run.steps is not None else ""
    chosen = "fixed before training" if dataset.split else "chosen without looking at results"
    names = " and ".join(LANGUAGE_NAMES[language] for language in sections[0].columns)
    draw_gallery(
        path,
        sections,
        title=f"Text → image retrieval, {names}",
        subtitle=f"model {context.run.model}{trained}   ·   run {context.run.name}   ·   queries {chosen}",
    )


def _enlarge(split: str, context: EvaluationContext) -> RetrievalSet:
    """The same set with images large enough to look at, if those of the model are smaller."""
    dataset, folder = context.sets[split], context.run.folder
    tars = None if folder is None else folder / dataset.split
    if tars is None or not dataset.split or dataset.images.shape[-1] >= _PICTURE_SIZE_PX or not tars.is_dir():
        return dataset
    transform = EvalTransform(_PICTURE_SIZE_PX, pictures=STANDARD)
    larger = read_retrieval_set(tars, name=dataset.name, transform=transform, split=dataset.split)
    return larger if larger.keys == dataset.keys else dataset


def _concept_section(split: str, dataset: RetrievalSet, context: EvaluationContext, results: Results) -> GallerySection:
    features = context.features[split]
    figures = {}
    for language in features.texts:
        metrics = results[split][language]
        parts = [
            f"R@{k} {format_percent(metrics[f't2i_r@{k}'])} %  (chance {format_percent(metrics[f't2i_chance@{k}'])} %)"
            for k in (1, 10)
        ]
        figures[language] = "   ·   ".join(parts)
    return GallerySection(
        title=_HEADINGS.get(dataset.split, context.titles[split]),
        note=_note(dataset.split, len(dataset.keys), context.run.heldout_style),
        columns=find_concepts(dataset, features, _choose_concepts(dataset)),
        figures=figures,
        num_images=len(dataset.keys),
    )


def _note(split: str, number: int, heldout_style: str) -> str:
    images = f"{number:,} images"
    if heldout_style in _STYLE_NAMES and split in _HEADINGS:
        *others, last = (name for style, name in _STYLE_NAMES.items() if style != heldout_style)
        images += f" drawn by {_STYLE_NAMES[heldout_style]}; training saw only {', '.join(others)} and {last}"
    if split == "heldout_families":
        images += ", and none of these concepts"
    return images


def _choose_concepts(dataset: RetrievalSet) -> list[str]:
    """The concepts chosen beforehand; in a set without them, some at even distances, with captions in all languages."""
    keys = {key.rpartition("\0")[2]: key for key in dataset.keys}
    if chosen := [keys[concept] for concept in _CONCEPTS.get(dataset.split, ()) if concept in keys]:
        return chosen
    distinct = list(dict.fromkeys(dataset.keys))
    spoken = [{number for number, _ in dataset.queries(language)} for language in dataset.languages]
    usable = [distinct[number] for number in sorted(set.intersection(*spoken) or spoken[0])]
    return usable[:: max(1, len(usable) // _NUM_CONCEPTS)][:_NUM_CONCEPTS]
