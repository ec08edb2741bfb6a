"""Draw what `benchmarks/grouped_training.py` measured beside what the planner predicted: docs/grouped_training.png.

    python scripts/draw_grouped_training.py benchmarks/results/grouped_training-xeon-2c.json

Needs the `plot` extra.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

REPO_ROOT = Path(__file__).resolve().parents[1]
COLOURS = {4: "#8a94a6", 2: "#4aa3df", 1: "#0b4f9c"}
INK, PALE = "#1f2933", "#d9dee5"


def read_curves(report: dict[str, Any]) -> dict[str, dict[int, list[tuple[float, float, float]]]]:
    """By bandwidth and group size: latency (ms), measured and planned speed over full logits, k = 1."""
    curves: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    for setting, measured in report["figures"]["speedup"].items():
        match = re.fullmatch(r"(\S+) ms, (.+), g=(\d+), k=(\d+)", setting)
        if match is None or match[4] != "1":
            continue
        planned = report["figures"]["planned"][setting]
        point = (float(match[1]), measured["full"], planned["full"])
        curves.setdefault(match[2], {}).setdefault(int(match[3]), []).append(point)
    return curves


def draw_panel(
    axes: Axes, bandwidth: str, curves: dict[int, list[tuple[float, float, float]]], *, labels: bool
) -> None:
    """One bandwidth: dots measured, lines planned."""
    for size, points in curves.items():
        places = range(len(points))
        axes.plot(places, [p[2] for p in points], color=COLOURS[size], linewidth=1.8)
        axes.plot(places, [p[1] for p in points], "o", color=COLOURS[size], markersize=6)
        if labels:
            text = "groups of 1" if size == 1 else f"groups of {size}" if size < 4 else "one group of 4"
            axes.annotate(
                text, (len(points) - 1, points[-1][2]), (10, 0), textcoords="offset points", va="center",
                color=COLOURS[size], weight="bold",
            )  # fmt: skip
    latencies = [p[0] for p in next(iter(curves.values()))]
    axes.set_xticks(range(len(latencies)), [f"{latency:g}" for latency in latencies])
    axes.set_title(bandwidth.replace("1000 Mbit/s", "1 Gbit/s"), loc="left", color=INK, fontsize=11)
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.axhline(1.6, color=INK, linewidth=0.8, linestyle=":")
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors="#616e7c")


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "docs" / "grouped_training.png")
    arguments = parser.parse_args()
    curves = read_curves(json.loads(arguments.result.read_text(encoding="utf-8")))
    figure, panels = plt.subplots(1, len(curves), figsize=(12, 4.4), sharey=True)
    first = next(iter(curves))
    for axes, (bandwidth, by_size) in zip(panels, curves.items(), strict=True):
        draw_panel(axes, bandwidth, by_size, labels=bandwidth == first)
    panels[0].set_ylim(0.8, 2.2)
    panels[0].text(0, 1.62, "the published +60 %", color="#616e7c", fontsize=9)
    panels[1].set_xlabel("latency of a link, one way, ms", color="#616e7c")
    figure.suptitle(
        "Grouping pays where latency is high: a training step's speed over full logits on every rank",
        x=0.01, ha="left", color=INK, weight="bold", fontsize=13,
    )  # fmt: skip
    figure.text(
        0.01, 0.01,
        "Four ranks on two shared cores, tiny model, 64 rows a rank. Dots: measured, medians. Lines: predicted by"
        " m2-plan's model for the measured links.",
        color="#616e7c", fontsize=9,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 0.97, 0.97))
    figure.savefig(arguments.output, dpi=130)
    print(arguments.output)


if __name__ == "__main__":
    main()
