"""What the gallery of a run shows.

The queries were chosen before any model was trained, from the captions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import FeatureModel, Tokenize
from m2_encoder.evaluation.pictures.gallery import GallerySection, draw_gallery, find_concepts, find_freely
from m2_encoder.evaluation.retrieval import SetFeatures
from m2_encoder.evaluation.tables import Results, format_percent

SPLIT_TITLES: Mapping[str, str] = {
    "heldout_style": "unseen style",
    "heldout_families": "unseen concepts and style",
    "val": "validation: unseen concepts",
    "val_style": "validation: unseen concepts and style",
    "train": "training set",
}
"""What tables call the splits of the embedded set."""

STYLE_NAMES: Mapping[str, str] = {
    "noto": "Noto", "twemoji": "Twemoji", "fluent": "Fluent", "openmoji": "OpenMoji",
}  # fmt: skip

# Everyday things: an elephant, a rocket, a guitar; then families that training never showed.
_CONCEPTS: Mapping[str, tuple[str, ...]] = {
    "heldout_style": ("1f418", "1f680", "1f3b8"),
    "heldout_families": ("1f63f", "1f68d", "1f989"),
}
_FREE_QUERIES = {
    "zh": ("红色的水果", "会飞的动物"),
    "en": ("a red fruit", "an animal that flies"),
}
_HEADINGS: Mapping[str, str] = {
    "heldout_style": "Known concepts in a style it has never seen",
    "heldout_families": "Concepts it has never seen, in a style it has never seen",
}
_NUM_CONCEPTS = 3


def draw_showcase(
    path: Path,
    *,
    model: FeatureModel,
    tokenizer: Tokenize,
    sets: Mapping[str, RetrievalSet],
    features: Mapping[str, SetFeatures],
    results: Results,
    subtitle: str,
    heldout_style: str = "",
) -> Path:
    """Draws `retrieval.png` for the sets of a report.

    Args:
        path: where to write.
        model: encodes the free queries.
        tokenizer: the model's own.
        sets: by split, with images to show.
        features: by split, of the same images.
        results: by split; numbers over the columns.
        subtitle: which run, which model.
        heldout_style: the drawing style that was not trained on, for the notes.

    Returns:
        `path`.
    """
    shown = [split for split in _HEADINGS if split in sets] or list(sets)[:1]
    sections = [_concept_section(split, sets[split], features[split], results, heldout_style) for split in shown]
    split = shown[0]
    columns = find_freely(model, tokenizer, sets[split], features[split], _FREE_QUERIES)
    number = len(sets[split].keys)
    note = f"the same {number:,} images as above; no caption says it like this, and no single image is the right one"
    sections.append(GallerySection("Free questions", note, columns, {}, number))
    return draw_gallery(path, sections, title="Text → image retrieval, 中文 and English", subtitle=subtitle)


def _concept_section(
    split: str, dataset: RetrievalSet, features: SetFeatures, results: Results, heldout_style: str
) -> GallerySection:
    figures = {}
    for language, metrics in results[split].items():
        parts = [
            f"R@{k} {format_percent(metrics[f't2i_r@{k}'])} %  (chance {format_percent(metrics[f't2i_chance@{k}'])} %)"
            for k in (1, 10)
        ]
        figures[language] = "   ·   ".join(parts)
    return GallerySection(
        title=_HEADINGS.get(split, SPLIT_TITLES.get(split, split)),
        note=_note(split, len(dataset.keys), heldout_style),
        columns=find_concepts(dataset, features, _choose_concepts(split, dataset)),
        figures=figures,
        num_images=len(dataset.keys),
    )


def _note(split: str, number: int, heldout_style: str) -> str:
    images = f"{number:,} images"
    if heldout_style in STYLE_NAMES and split in _HEADINGS:
        others = [name for style, name in STYLE_NAMES.items() if style != heldout_style]
        images += f" drawn by {STYLE_NAMES[heldout_style]}; training saw only {', '.join(others[:-1])} and {others[-1]}"
    if split == "heldout_families":
        images += ", and none of these concepts"
    return images


def _choose_concepts(split: str, dataset: RetrievalSet) -> list[str]:
    """The concepts chosen beforehand; in a set without them, some at even distances."""
    chosen = [key for key in _CONCEPTS.get(split, ()) if key in dataset.keys]
    distinct = list(dict.fromkeys(dataset.keys))
    return chosen or distinct[:: max(1, len(distinct) // _NUM_CONCEPTS)][:_NUM_CONCEPTS]
