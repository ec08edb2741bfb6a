"""Tables of records for the terminal: a row per set, language and protocol; models below each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from m2_encoder.evaluation.records import Record
from m2_encoder.evaluation.report.page import ModelFacts, human, number, order_of_language
from m2_encoder.evaluation.tables import CellTable

_SUMMARY: Final = ("mean_recall", "t2i_mean_recall", "top1", "map", "knn_top1", "linear_top1")
"""Metrics whose interval is shown."""


def record_tables(records: Sequence[Record]) -> list[CellTable]:
    """A table for each task; all models of a row's set follow each other."""
    tasks = dict.fromkeys(each.task for each in records)
    return [_table(task, [each for each in records if each.task == task]) for task in tasks]


def _table(task: str, records: Sequence[Record]) -> CellTable:
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for each in records:
        groups.setdefault(_key(each), {})[each.metric] = each
    metrics = list(dict.fromkeys(each.metric for each in records))
    labels = ["set", "language"]
    labels += [
        name for name in ("protocol", "templates", "model") if len({getattr(each, name) for each in records}) > 1
    ]
    rows = []
    models = list(dict.fromkeys(each.model for each in records))
    templates = list(dict.fromkeys(each.templates for each in records))

    def order(found: dict[str, Record]) -> tuple[Any, ...]:
        """As sets and languages sort; templates and models in the order in which they were given."""
        first = next(iter(found.values()))
        return (*_key(first)[:-2], templates.index(first.templates), models.index(first.model))

    for found in sorted(groups.values(), key=order):
        first = next(iter(found.values()))
        place = f"{first.dataset} · {first.subset}" if first.subset else first.dataset
        words = {"set": place, "language": first.language, "protocol": first.protocol, "model": first.model}
        words["templates"] = first.templates
        summary = next((found[name] for name in _SUMMARY if name in found), first)
        cells = [words[label] for label in labels] + [number(found[m].value) if m in found else "" for m in metrics]
        interval = "" if summary.low is None else f"{number(summary.low)}–{number(summary.high)}"
        about = [interval, number(summary.chance), number(summary.published), f"{summary.n:,}"]
        rows.append([*cells, *([""] * len(about) if task == "geometry" else about)])  # its numbers have no common n
    headings = [*labels, *(metric.replace("_", " ") for metric in metrics), "95 %", "chance", "published", "n"]
    filled = [n for n in range(len(headings)) if n < len(labels) or any(row[n] not in ("", "–") for row in rows)]
    shown = [[row[number] for number in filled] for row in rows]
    remarks = dict.fromkeys(f"{each.dataset}: {each.remark}" for each in records if each.remark)
    unit = "" if task == "geometry" else ", percent"
    title = f"{task.capitalize()}{unit}"
    return CellTable(title, [headings[number] for number in filled], shown, len(labels), tuple(remarks))


def _key(record: Record) -> tuple[Any, ...]:
    place = (record.dataset, record.subset, record.protocol, order_of_language(record.language))
    return (*place, record.label_set, record.templates, record.model)


def cost_table(models: Iterable[ModelFacts]) -> CellTable:
    """What models are and cost on this machine."""
    rows = [
        [
            each.name,
            human(each.parameters),
            number(None if each.file_bytes is None else each.file_bytes / 1e6),
            str(each.embed_dim or "–"),
            str(each.image_size or "–"),
            number(each.peak_mb, 0),
            number(each.ms_per_image),
            number(each.ms_per_text),
        ]
        for each in models
    ]
    headings = ["model", "parameters", "file, MB", "features", "image, px", "peak memory, MB", "ms/image", "ms/text"]
    return CellTable("Models", headings, rows, num_labels=1)
