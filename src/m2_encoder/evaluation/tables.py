"""Results as a table: per split a row for each language, and what chance would reach under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m2_encoder.evaluation.markdown import to_markdown
from m2_encoder.evaluation.metrics import RECALL_KS

CHANCE = "chance"
"""The "language" of the row that says what a random order would reach."""

DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}
"""Directions of retrieval and what tables call them."""

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> language -> what `retrieval_metrics` returns."""


class TableRow(NamedTuple):
    """One line of the table.

    Attributes:
        split: name of the set.
        language: "zh", "en" or "chance".
        values: percent, by `t2i_r@1` and so on; `mean_recall` is the mean of them.
        num_images: images in the set.
    """

    split: str
    language: str
    values: dict[str, float]
    num_images: int


def table_rows(results: Results, *, ks: Sequence[int] = RECALL_KS) -> list[TableRow]:
    """Rows in the order of `results`, chance last in each split.

    Args:
        results: by split and language.
        ks: cut-offs.
    """
    rows = []
    for split, languages in results.items():
        for language, metrics in languages.items():
            values = {name: metrics[name] for name in [*_columns(ks), "mean_recall"]}
            rows.append(TableRow(split, language, values, int(metrics["num_images"])))
        first = next(iter(languages.values()))
        chance = {name: first[name.replace("_r@", "_chance@")] for name in _columns(ks)}
        chance["mean_recall"] = sum(chance.values()) / len(chance)
        rows.append(TableRow(split, CHANCE, chance, int(first["num_images"])))
    return rows


def markdown_table(results: Results, *, titles: Mapping[str, str], ks: Sequence[int] = RECALL_KS) -> str:
    """The table for a README or a model card, in percent.

    Args:
        results: by split and language.
        titles: what a split is called; its name where there is none.
        ks: cut-offs.
    """
    header = ["split", "images", "language"]
    header += [f"{name} R@{k}" for name in DIRECTIONS.values() for k in ks] + ["mean"]
    lines = [header, ["---", "--:", "---"] + ["--:"] * (len(header) - 3)]
    previous = None
    for row in table_rows(results, ks=ks):
        same = row.split == previous
        previous = row.split
        numbers = [format_percent(value) for value in row.values.values()]
        if row.language == CHANCE:
            numbers = [f"*{number}*" for number in numbers]
        name = f"*{CHANCE}*" if row.language == CHANCE else row.language
        start = ["", ""] if same else [titles.get(row.split, row.split), f"{row.num_images:,}"]
        lines.append([*start, name, *numbers])
    return to_markdown(lines) + "\n"


def format_percent(value: float) -> str:
    """One decimal; two below one percent, where chance lives."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _columns(ks: Sequence[int]) -> list[str]:
    return [f"{direction}_r@{k}" for direction in DIRECTIONS for k in ks]
