"""What an export was found to give: a table on the terminal, `parity.json`, and a part of the model card."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from m2_encoder.checkpoints.card import FILES_START, files_section, table
from m2_encoder.checkpoints.card_words import heading
from m2_encoder.checkpoints.exported import CARD_FILE
from m2_encoder.exports.base import Measured
from m2_encoder.exports.recall import NUM_PICTURES
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.files import write_json
from m2_encoder.record import describe_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARITY_FILE: Final = "parity.json"
_CARD_START: Final = heading("Formats")
_REFERENCE: Final = "torch"
_RECALL_HEADER: Final = ("", "zh t2i", "zh i2t", "en t2i", "en i2t", "mean")
RECALL_TITLE: Final = f"% found among {NUM_PICTURES} built-in drawings, mean of R@1, 5 and 10"
WARNING: Final = "warning: "
"""How a note begins that users should not overlook."""

_TOOLS: Final = ("onnx", "onnxruntime", "onnxscript", "tokenizers", "transformers")


class FormatResult(NamedTuple):
    """One format after it was tried."""

    name: str  # as in `to=[...]`
    bound: float  # smallest cosine that it must reach
    measured: Measured
    files: Mapping[str, int]  # path in the export to bytes; without the model card, which all formats share
    usage: str  # for the model card

    @property
    def holds(self) -> bool:
        """Whether it gives our features within its bound."""
        return not self.rule

    @property
    def rule(self) -> str:
        """Why it does not; empty if it does."""
        cosine, recall = self.measured.smallest_cosine, self.measured.recall
        if not cosine >= self.bound:
            return f"smallest cosine {cosine:.7f}, {self.bound} is the least"
        return "" if recall is None else recall.rule(cosine)


class Parity(NamedTuple):
    """All formats of an export."""

    results: Sequence[FormatResult]
    torch_ms: tuple[float, float] | None  # medians of one picture and one text; None where nothing else was timed

    @property
    def missed(self) -> list[FormatResult]:
        """Those that are not written."""
        return [each for each in self.results if not each.holds]


def print_parity(console: Console, parity: Parity) -> None:
    """The table, what else was found, and a line for each format that missed its bound."""
    from rich.text import Text

    console.print(_table(parity))
    if rows := _recall_rows(parity.results):
        console.print(_grid(RECALL_TITLE, _RECALL_HEADER, rows))
    for each in parity.results:
        for note in each.measured.notes:
            style = "yellow" if note.en.startswith(WARNING) else ""
            console.print(Text(f"{each.name}: {note.en}", style=style), soft_wrap=True)
    for each in parity.missed:
        console.print(Text(f"{each.name}: {each.rule}: not written", style="bold red"), soft_wrap=True)


def _table(parity: Parity) -> Table:
    tried = f"{len(TEXTS)} texts and {len(make_pictures())} pictures against load()"
    header = ("format", "largest\ndifference", "smallest\ncosine", "MB", "ms a\npicture", "ms a\ntext", "peak\nMB")
    return _grid("weights read back" if parity.torch_ms is None else tried, header, _rows(parity))


def _grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=title)
    for number, name in enumerate(header):
        grid.add_column(name, justify="right" if number else "left")
    for row in rows:
        grid.add_row(*row)
    return grid


def _rows(parity: Parity) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if parity.torch_ms is not None:
        image_ms, text_ms = parity.torch_ms
        rows.append((_REFERENCE, "", "", "", _number(image_ms), _number(text_ms), ""))
    for each in parity.results:
        found = each.measured
        rows.append(
            (
                each.name,
                f"{found.largest_difference:.1e}" if found.largest_difference else "0",
                f"{found.smallest_cosine:.7f}",
                _number(sum(each.files.values()) / 1e6),
                _number(found.image_ms),
                _number(found.text_ms),
                "" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:,.0f}",
            )
        )
    return rows


def _recall_rows(results: Sequence[FormatResult]) -> list[tuple[str, ...]]:
    """Recall of the model, then of each format that has it; none if no format has."""
    found = {each.name: each.measured.recall for each in results if each.measured.recall is not None}
    if not found:
        return []
    first = next(iter(found.values()))
    lines = {
        f"{_REFERENCE}, fp32": (first.ours, first.ours_mean),
        **{name: (recall.theirs, recall.theirs_mean) for name, recall in found.items()},
    }
    rows = [(name, *(f"{value:.2f}" for value in (*values.values(), mean))) for name, (values, mean) in lines.items()]
    return [*rows, ("chance", *[f"{first.chance:.2f}"] * (len(first.ours) + 1))]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_parity(folder: Path, parity: Parity, card: str) -> None:
    """Writes `parity.json`, and the card with what it says about formats."""
    kept = [each for each in parity.results if each.holds]
    write_json(folder / PARITY_FILE, _content(parity))
    (folder / CARD_FILE).write_text(without_formats(card) + _section(folder, parity, kept), encoding="utf-8")


def _content(parity: Parity) -> dict[str, Any]:
    return {
        "texts": len(TEXTS),
        "pictures": len(make_pictures()),
        "threads": torch.get_num_threads(),
        "versions": describe_run()["versions"] | _tool_versions(),
        "torch_ms": None if parity.torch_ms is None else dict(zip(("image", "text"), parity.torch_ms, strict=True)),
        "formats": {
            each.name: {
                "written": each.holds,
                "bound": each.bound,
                **_plain(each.measured),
                "files": dict(each.files),
            }
            for each in parity.results
        },
    }


def _tool_versions() -> dict[str, str]:
    """Of the libraries that formats are written and tried with, as far as they are there."""
    found = {}
    for name in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _plain(found: Measured) -> dict[str, Any]:
    recall = None if found.recall is None else found.recall._asdict()
    return found._asdict() | {"notes": [note.en for note in found.notes], "recall": recall}


def without_formats(card: str) -> str:
    """A card as it is before `write_parity`."""
    return card.partition(f"\n{_CARD_START}\n")[0].partition(f"\n{FILES_START}\n")[0]


def _section(folder: Path, parity: Parity, kept: Sequence[FormatResult]) -> str:
    parts = [f"\n{_CARD_START}\n"]
    for each in kept:
        notes = "".join(f"\n- {note.line}" for note in each.measured.notes)
        parts.append(f"### {each.name}\n\n{each.usage}\n{notes}\n" if notes else f"### {each.name}\n\n{each.usage}\n")
    texts, pictures = len(TEXTS), len(make_pictures())
    lead = (
        f"{texts} 条文本和 {pictures} 张图片，逐个与 `load()` 对比 / "
        f"{texts} texts and {pictures} pictures, one at a time, against `load()`:\n"
    )
    header = ("format", "largest difference", "smallest cosine", "MB", "ms a picture", "ms a text", "peak MB")
    names = {_REFERENCE, *(each.name for each in kept)}
    parts += [lead, table(header, [row for row in _rows(parity) if row[0] in names]) + "\n"]
    if recalls := _recall_rows(kept):
        parts += [
            f"内置图画 {NUM_PICTURES} 张，R@1、5、10 的平均 / {RECALL_TITLE}:\n",
            table(_RECALL_HEADER, recalls) + "\n",
        ]
    written = sorted({name for each in kept for name in each.files})  # some are of several formats
    return "\n".join(parts) + files_section(folder, written)
