"""Draw what `benchmarks/stamps.py` measured, gained against kept, for each way to adapt: docs/adaptation.png.

    python scripts/draw_adaptation.py benchmarks/results/stamps-epyc-2c.json

Needs the `plot` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

REPO_ROOT = Path(__file__).resolve().parents[1]
INK, MUTED, PALE = "#1f2933", "#616e7c", "#d9dee5"
COLOURS = {"full": "#0b5394", "lora": "#c05621", "locked image tower": "#6b8e23"}
OTHERS = "#4aa3df"
OFFSETS = {"full": (-4, -17), "lora": (-4, -17), "locked image tower": (-4, -17), "full, layer decay 0.7": (-130, -3)}
KEPT, GAINED = "emoji_heldout_style", "mine"

Point = tuple[float, float]


def read_point(row: Mapping[str, Any]) -> tuple[Point, list[Point]]:
    """(kept, gained) as the mean over seeds, and of each seed."""
    seeds = sorted(int(key.split()[-1]) for key in row if key.startswith(f"{GAINED} "))
    each = [(row[f"{KEPT} {seed}"], row[f"{GAINED} {seed}"]) for seed in seeds]
    return (statistics.mean(x for x, _ in each), statistics.mean(y for _, y in each)), each


def draw_line(axes: Axes, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """The weights between start and end."""
    found = {row["share"]: read_point(row)[0] for row in rows}
    line = [found[share] for share in ("before", "25 %", "50 %", "75 %", "after")]
    axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[name], linewidth=1.6, markersize=4, zorder=2)
    for share in ("25 %", "50 %", "75 %"):
        if name == "full":
            note(axes, share, found[share], MUTED, (5, 5))


def note(axes: Axes, text: str, point: Point, colour: str, offset: tuple[float, float]) -> None:
    """A label beside a point."""
    axes.annotate(text, point, offset, textcoords="offset points", color=colour, fontsize=9, zorder=4)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "docs" / "adaptation.png")
    arguments = parser.parse_args()
    rows = json.loads(arguments.result.read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for name in COLOURS:
        draw_line(axes, name, [row for row in rows if row["what"] == name])
    for row in rows:
        if row["share"] != "after":
            continue
        colour = COLOURS.get(row["what"], OTHERS)
        mean, each = read_point(row)
        axes.plot(*zip(*each, strict=True), ".", color=colour, alpha=0.5, markersize=5, zorder=1)
        axes.plot(*mean, "o", color=colour, markersize=8, zorder=3)
        name = row["what"]
        note(axes, name, mean, colour if name in COLOURS else INK, OFFSETS.get(name, (8, -3)))
    start = next(read_point(row)[0] for row in rows if row["share"] == "before")
    axes.plot(*start, "s", color=INK, markersize=8, zorder=3)
    note(axes, "before", start, INK, (-12, -16))
    axes.set_xlabel("kept: mean recall on the emoji drawings that no training saw, percent", color=MUTED, loc="left")
    axes.set_ylabel("gained: mean recall on the stamps kept apart, percent", color=MUTED, loc="bottom")
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=MUTED)
    axes.set_xlim(left=0)
    title = "What each way gains and keeps; to the upper right is better"
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    caption = "Lines: weights between start and end (WiSE-FT). Small dots: single seeds."
    figure.supxlabel(caption, x=0.01, ha="left", color=MUTED, fontsize=9)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
