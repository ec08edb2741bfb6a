"""A picture of a sweep: the effect of each factor, and pairs of factors; needs the extra `plot`."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from m2_encoder.analysis.effects import Scored
from m2_encoder.analysis.runs import Runs
from m2_encoder.analysis.table import show_value
from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file

_INK: Final = "#1f2933"
_MUTED: Final = "#7b8794"
_GRID: Final = "#e4e7eb"
_COLORS: Final = ("#0b5394", "#c05621", "#4aa3df", "#6b8e23", "#8e5ea2", "#9aa5b1")
_SEED: Final = "seed"
_MOST_FACTORS: Final = 6
_MOST_PAIRS: Final = 3
_MOST_LEVELS: Final = 8  # of numbers, each with a place of its own
_MOST_IN_ROW: Final = 3
_WIDTH: Final = 30  # characters that fit below a panel side by side


def draw_effects(path: str | os.PathLike[str], runs: Runs, metrics: Sequence[str] | None = None) -> Path:
    """Writes `plot_effects` to a file: png, svg or pdf; returns the path."""
    figure = plot_effects(runs, metrics)
    with matplotlib.rc_context({"svg.fonttype": "none"}), atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    return Path(path)


def plot_effects(runs: Runs, metrics: Sequence[str] | None = None) -> Figure:
    """A picture of how a score changes with each factor, and with pairs of those that change it most.

    The score of a run is the mean of its final `metrics`. A point is one run; the line goes through means of a level
    over all runs that have it, which is fair where every combination was run. Bars are the standard deviation over
    seeds, each averaged in the same way.

    Args:
        runs: which vary in a setting at least.
        metrics: by default the mean recalls of the validation sets.

    Raises:
        UserError: if the runs differ in nothing but the seed.
    """
    chosen = tuple(metrics or runs.validation_recalls)
    scored = runs.scored(*chosen)
    if not scored or not runs.factors:
        raise UserError(f"{len(scored)} runs that differ in nothing but the seed: there is no effect to draw")
    factors = sorted(runs.factors, key=lambda key: -_effect(scored, key))[:_MOST_FACTORS]
    stepped = [key for key in factors if not _is_drawn_at_random(scored, key)]
    pairs = list(itertools.combinations(stepped[:3], 2))[:_MOST_PAIRS]
    panels: list[str | tuple[str, str]] = [*factors, *pairs]
    split = len(factors) if len(panels) > _MOST_IN_ROW and pairs else len(panels)
    rows = [each for each in (panels[:split], panels[split:]) if each]
    columns = max(map(len, rows))
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": _MUTED, "svg.fonttype": "none"}):
        size = (max(3.1 * columns, 5.0), 3.0 * len(rows) + 0.9)
        figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), columns, sharey=True, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for line, row in zip(grid, rows, strict=True):
            for axes, panel in zip(line, row, strict=False):
                _draw_main(axes, scored, panel) if isinstance(panel, str) else _draw_pair(axes, scored, *panel)
        figure.suptitle(
            f"{len(scored)} runs: what changes the mean recall", x=0.012, ha="left", fontsize=13, color=_INK
        )
        note = "\n".join(textwrap.wrap(_caption(scored, chosen, factors), int(15.5 * size[0])))
        figure.supxlabel(note, x=0.012, ha="left", fontsize=7.5, color=_MUTED)
    return figure


_Scored = Sequence[Scored]


def _levels(scored: _Scored, key: str) -> list[Any]:
    """The values of a setting, numbers in order."""
    values = list({repr(settings.get(key)): settings.get(key) for settings, _ in scored}.values())
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted(values) if numeric else values


def _is_drawn_at_random(scored: _Scored, key: str) -> bool:
    """Whether a factor has as many numbers as a search draws: a place for each would show nothing."""
    levels = _levels(scored, key)
    return len(levels) > _MOST_LEVELS and all(isinstance(level, int | float) for level in levels)


def _at(scored: _Scored, wanted: dict[str, Any]) -> list[float]:
    return [score for settings, score in scored if all(repr(settings.get(k)) == repr(v) for k, v in wanted.items())]


def _effect(scored: _Scored, key: str) -> float:
    """How far the means of its levels are apart."""
    means = [statistics.fmean(_at(scored, {key: level})) for level in _levels(scored, key)]
    return max(means) - min(means)


def _spread(scored: _Scored, wanted: dict[str, Any]) -> float | None:
    """Standard deviation over seeds; None for one seed."""
    by_seed = [_at(scored, {**wanted, _SEED: seed}) for seed in _levels(scored, _SEED)]
    means = [statistics.fmean(scores) for scores in by_seed if scores]
    return statistics.stdev(means) if len(means) > 1 else None


def _draw_line(
    axes: Axes, scored: _Scored, key: str, wanted: dict[str, Any], color: str, *, label: str = "", shift: float = 0.0
) -> None:
    levels = [(place + shift, {**wanted, key: level}) for place, level in enumerate(_levels(scored, key))]
    at = [(place, each) for place, each in levels if _at(scored, each)]
    means = [statistics.fmean(_at(scored, each)) for _, each in at]
    bars = [_spread(scored, each) or 0.0 for _, each in at]
    axes.errorbar(
        [place for place, _ in at], means, bars, color=color, label=label, marker="o", markersize=4, lw=1.8, capsize=3
    )


def _finish(axes: Axes, scored: _Scored, key: str) -> None:
    levels = _levels(scored, key)
    labels = [_show_level(level) for level in levels]
    axes.set_xticks(range(len(levels)), labels)
    if sum(map(len, labels)) + 2 * len(labels) > _WIDTH:
        axes.tick_params(axis="x", labelrotation=20)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.4, len(levels) - 0.6)
    _quieten(axes, key)


def _quieten(axes: Axes, key: str) -> None:
    axes.set_visible(True)
    axes.set_xlabel(key, color=_INK)
    axes.tick_params(colors=_MUTED, length=0, labelleft=True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _show_level(level: object) -> str:
    return textwrap.shorten(show_value(level) or "null", _WIDTH, placeholder="…")


def _draw_main(axes: Axes, scored: _Scored, key: str) -> None:
    if _is_drawn_at_random(scored, key):
        values = [float(settings[key]) for settings, _ in scored if settings.get(key) is not None]
        axes.plot(values, [score for settings, score in scored if settings.get(key) is not None], "o", ms=4, alpha=0.7)
        if min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")  # the shipped font has no minus for an exponent
            axes.xaxis.set_minor_formatter(NullFormatter())
        _quieten(axes, key)
        return
    for place, level in enumerate(_levels(scored, key)):
        scores = _at(scored, {key: level})
        axes.plot([place] * len(scores), scores, "o", color="#9fb3c8", markersize=3.5, alpha=0.7, linewidth=0)
    _draw_line(axes, scored, key, {}, _COLORS[0])
    _finish(axes, scored, key)


def _draw_pair(axes: Axes, scored: _Scored, key: str, other: str) -> None:
    levels = _levels(scored, other)
    for number, (color, level) in enumerate(zip(itertools.cycle(_COLORS), levels, strict=False)):
        shift = 0.06 * (number - (len(levels) - 1) / 2)  # equal lines would hide each other
        _draw_line(axes, scored, key, {other: level}, color, label=_show_level(level), shift=shift)
    _finish(axes, scored, key)
    axes.legend(title=other, fontsize=7.5, title_fontsize=7.5, frameon=False)


def _caption(scored: _Scored, metrics: Sequence[str], factors: Sequence[str]) -> str:
    seeds = len(_levels(scored, _SEED))
    what = f"Mean of {', '.join(metrics)}, percent. Points: runs. Lines: means of a level over all runs that have it."
    bars = f"Bars: standard deviation over {seeds} seeds." if seeds > 1 else "One seed: nothing is known about chance."
    runs = [repr([settings.get(key) for key in (*factors, _SEED)]) for settings, _ in scored]
    is_whole = len(set(runs)) == math.prod(len(_levels(scored, key)) for key in (*factors, _SEED))
    return f"{what} {bars}" + (
        "" if is_whole else " Not every combination was run: levels differ in more than one thing."
    )
