r"""Where lists of search results end: precision and recall of the line that `picture_search/ending.py` draws.

Queries are names, aliases and keywords of the built-in drawings; a drawing is right if its concept has the text. The
two constants of the line were chosen on drawings that the model was trained on (`chosen on`); the others it never saw:
known concepts in another style, unknown concepts, and stamps of Tux Paint with names of their own
(`apt install tuxpaint-stamps-default`; left out where they are not installed). Beside the line stand the first ten, one
threshold for all queries (the best for the first gallery, by F1), the line after neutral prompts were subtracted, and
the best end that each list has, which no rule can know. `absent` are words that name nothing in the
gallery. The figures at the end compare the bound against chance with what neutral prompts reach.

    make train
    python benchmarks/result_endings.py --model outputs/emoji/export \
      --json benchmarks/results/result_endings-MACHINE.json
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from _common import Report, parse_arguments

from m2_encoder.data.emoji.dataset import EMOJI_STYLES, load_emoji_concepts, load_emoji_images
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.prompts import PLACE, load_templates
from m2_encoder.evaluation.sets.tuxpaint import DEBIAN_FOLDER, read_tuxpaint
from m2_encoder.picture_search.ending import chance_lift, find_end
from m2_encoder.picture_search.model import open_search_model

Floats = npt.NDArray[np.float32]
Judge = Callable[[Floats, Floats], int]
"""Scores of all pictures, best first, and of a sample, to the number of results before the end."""

_SAMPLE = 2000
_TRAINED = ("noto", "fluent", "openmoji")
_QUERIES = 800
_ABSENT = 300


class Gallery(NamedTuple):
    """Pictures, queries in one language, and which pictures are right."""

    name: str
    language: str
    pictures: Floats  # (N, D)
    queries: Floats  # (Q, D)
    right: list[npt.NDArray[np.int64]]  # rows, by query
    absent: Floats  # queries that name nothing, (A, D)


def encode_pictures(model: EvaluatedModel, contents: Sequence[bytes]) -> Floats:
    return np.asarray(encode_images(model.model, torch.stack([model.preprocess(each) for each in contents])).numpy())


def encode_words(model: EvaluatedModel, texts: Sequence[str]) -> Floats:
    return np.asarray(encode_texts(model.model, texts, model.tokenizer).numpy())


def emoji_galleries(model: EvaluatedModel) -> list[Gallery]:
    concepts = load_emoji_concepts()
    images = {style: load_emoji_images(style) for style in EMOJI_STYLES}
    rows = [(number, style) for style in EMOJI_STYLES for number, c in enumerate(concepts) if style in c.styles]
    features = encode_pictures(model, [images[style][concepts[number].key] for number, style in rows])
    parts = {
        "drawings trained on": ("train", _TRAINED[::2]),
        "another style": ("train", ("twemoji",)),
        "unknown concepts": ("heldout", ("twemoji",)),
    }
    galleries = []
    for language in ("zh", "en"):
        texts = sorted({text for concept in concepts for text in concept.captions[language].texts()})
        words = dict(zip(texts, encode_words(model, texts), strict=True))
        for name, (split, styles) in parts.items():
            own = [i for i, (number, style) in enumerate(rows) if concepts[number].split == split and style in styles]
            right: dict[str, list[int]] = {}
            for row, i in enumerate(own):
                for text in concepts[rows[i][0]].captions[language].texts():
                    right.setdefault(text, []).append(row)
            absent = [text for text in texts if text not in right]
            galleries.append(_make(name, language, features[own], right, words, absent))
    return galleries


def stamp_galleries(model: EvaluatedModel) -> list[Gallery]:
    if not Path(DEBIAN_FOLDER).is_dir():
        return []
    stamps = read_tuxpaint(languages=["zh_CN", "en"])
    features = encode_pictures(model, [picture.read() for picture in stamps.pictures])
    galleries = []
    for language, texts in stamps.texts.items():
        right: dict[str, list[int]] = {}
        for text, picture in texts.pairs.tolist():
            right.setdefault(texts.rows[text], []).append(picture)
        words = dict(zip(texts.rows, encode_words(model, texts.rows), strict=True))
        galleries.append(_make("stamps", language[:2], features, right, words, []))
    return galleries


def _make(
    name: str, language: str, pictures: Floats, right: dict[str, list[int]], words: dict[str, Any], absent: list[str]
) -> Gallery:
    chosen = sorted(right)
    random.Random(0).shuffle(chosen)
    random.Random(0).shuffle(absent)
    queries = np.stack([words[text] for text in chosen[:_QUERIES]])
    nothing = np.stack([words[text] for text in absent[:_ABSENT]]) if absent else queries[:0]
    return Gallery(name, language, pictures, queries, [np.array(right[text]) for text in chosen[:_QUERIES]], nothing)


def measure(gallery: Gallery, judge: Judge, *, minus: Floats | None = None) -> dict[str, Any]:
    """Means over queries: precision (0 for an empty list), recall, F1; length of the lists, share of empty ones."""
    step = -(-len(gallery.pictures) // _SAMPLE)
    bias = 0 if minus is None else gallery.pictures @ minus
    found = []
    for scores, right in zip(gallery.queries @ gallery.pictures.T - bias, gallery.right, strict=True):
        order = np.argsort(-scores, kind="stable")
        end = judge(scores[order], scores[::step])
        hits = int(np.isin(order[:end], right).sum())
        found.append((hits / max(end, 1), hits / len(right), 2 * hits / (end + len(right)), end))
    ends = [judge(-np.sort(-scores), scores[::step]) for scores in gallery.absent @ gallery.pictures.T - bias]
    precision, recall, f1, _ = np.mean(found, axis=0)
    return {
        "precision": round(100 * float(precision), 1),
        "recall": round(100 * float(recall), 1),
        "f1": round(100 * float(f1), 1),
        "median_end": int(np.median([row[3] for row in found])),
        "empty": f"{100 * np.mean([row[3] == 0 for row in found]):.0f} %",
        "absent_empty": f"{100 * np.mean(np.array(ends) == 0):.0f} %" if ends else "-",
    }


def best_ends(gallery: Gallery) -> dict[str, Any]:
    """The end of each list with the best F1."""
    left = iter(zip(gallery.queries, gallery.right, strict=True))

    def judge(_scores: Floats, _sample: Floats) -> int:
        query, right = next(left)
        order = np.argsort(-(gallery.pictures @ query), kind="stable")
        hits = np.isin(order, right).cumsum()
        return int(np.argmax(2 * hits / (np.arange(1, len(order) + 1) + len(right)))) + 1

    return measure(gallery._replace(absent=gallery.absent[:0]), judge)


def neutral_lift(gallery: Gallery, neutral: Floats) -> float:
    """How far the best picture of a neutral prompt rises over the mean, in deviations; the median of all prompts."""
    scores = neutral @ gallery.pictures.T
    return float(np.median((scores.max(axis=1) - scores.mean(axis=1)) / scores.std(axis=1)))


def flat(threshold: float) -> Judge:
    return lambda scores, _: int(np.count_nonzero(scores >= threshold))


def best_threshold(galleries: Sequence[Gallery]) -> float:
    scores = np.concatenate([(each.queries @ each.pictures.T).ravel() for each in galleries])
    candidates = np.quantile(scores, (0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999))
    return float(max(candidates, key=lambda value: sum(measure(each, flat(value))["f1"] for each in galleries)))


def main() -> None:
    arguments = parse_arguments(
        __doc__, configure=lambda parser: parser.add_argument("--model", required=True, help="a folder of m2-export")
    )
    report = Report("where results end: precision and recall, percent")
    model = open_search_model(arguments.model).encoder
    neutral = {}
    for language in ("zh", "en"):
        rows = [row for family in ("general", "photos") for row in load_templates(family, language).rows]
        neutral[language] = encode_words(model, [row.replace(PLACE, "") for row in rows if row != PLACE])
    galleries = [*emoji_galleries(model), *stamp_galleries(model)]
    threshold = best_threshold([each for each in galleries if each.name == "drawings trained on"])
    for each in galleries:
        total = len(each.pictures)

        def line(scores: Floats, sample: Floats, total: int = total) -> int:
            return find_end(scores, sample, total)

        what = f"{each.name}, {each.language}"
        report.add(f"{what}: line", pictures=total, queries=len(each.queries), **measure(each, line))
        report.add(f"{what}: line, minus neutral prompts", pictures=total, queries=len(each.queries),
                   **measure(each, line, minus=neutral[each.language].mean(axis=0)))  # fmt: skip
        report.add(f"{what}: first ten", pictures=total, queries=len(each.queries), **measure(each, lambda *_: 10))
        report.add(f"{what}: one threshold", pictures=total, queries=len(each.queries),
                   **measure(each, flat(threshold)))  # fmt: skip
        report.add(f"{what}: best end", pictures=total, queries=len(each.queries), **best_ends(each))
    report.figures["one threshold"] = threshold
    for each in galleries:
        lift, bound = neutral_lift(each, neutral[each.language]), chance_lift(len(each.pictures))
        report.figures[f"{each.name}, {each.language}"] = (
            f"neutral prompts rise by {lift:.2f}, the bound is {bound:.2f}"
        )
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
