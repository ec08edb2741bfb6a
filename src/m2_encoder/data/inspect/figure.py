"""A figure of a source's statistics; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

from m2_encoder.data.inspect.source_report import SourceReport
from m2_encoder.data.inspect.statistics import REPETITION_CLASSES, Statistics
from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file

_INK: Final = "#1f2933"
_MUTED: Final = "#7b8794"
_GRID: Final = "#e4e7eb"
_COLORS: Final = {"en": "#0b5394", "zh": "#c05621"}
_LINES: Final = {"en": "-", "zh": (0, (4, 2))}
_BAR_COLORS: Final = {"captions": "#4a7aa7", "images": "#b9a44c"}
_MISSING: Final = "□"  # for what no font draws; DejaVu, which matplotlib ships, has it
_LAST_FONT: Final = "DejaVu Sans"
_TAIL: Final = 0.995  # lengths beyond this quantile leave the picture
_MAX_TEXT: Final = 16
_LEAST_BARS: Final = 8  # room for so many, so that two captions do not fill the panel


def draw_statistics(
    path: Path,
    statistics: Statistics,
    report: SourceReport,
    *,
    title: str,
    max_tokens: int,
    font: Path | None = None,
) -> None:
    """Draw languages, lengths, sizes and duplicates of a source.

    `max_tokens` is where a model cuts captions; `font` is tried before the shipped one.

    Raises:
        UserError: if the font cannot be read, or the place cannot be written.
    """
    families, drawable = load_fonts(font)
    settings: dict[Any, Any] = {
        "font.family": families,
        "font.size": 9,
        "axes.edgecolor": _MUTED,
        "axes.unicode_minus": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(12, 7), dpi=140, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3)
        _draw_languages(axes[0, 0], statistics)
        _draw_lengths(axes[0, 1], statistics, "words", None)
        _draw_lengths(axes[0, 2], statistics, "tokens", max_tokens)
        _draw_sizes(axes[1, 0], statistics)
        _draw_repetition(axes[1, 1], statistics)
        _draw_frequent(axes[1, 2], report.frequent_captions, drawable)
        heading = f"{_drawn(title, drawable)}: {'' if report.is_whole else 'about '}{report.samples:,} samples"
        figure.suptitle(heading, x=0.01, ha="left", fontsize=13, color=_INK)
        figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8, color=_MUTED)
        with atomic_file(path, key="plot") as temporary:
            figure.savefig(temporary, format=path.suffix[1:])


def load_fonts(font: Path | None = None) -> tuple[list[str], frozenset[int]]:
    """Makes matplotlib know the shipped font, and another one that is tried before it.

    Returns:
        Families in the order of preference, and all characters that one of them draws.
    """
    names: list[str] = []
    characters: set[int] = set()
    resource = files("m2_encoder").joinpath("assets", "fonts", "NotoSansSC-subset.ttf")
    with as_file(resource) as shipped:
        for path in [*([font] if font else []), shipped]:
            name, drawn = _add_font(path)
            names.append(name)
            characters |= drawn
    last = fontManager.findfont(_LAST_FONT)
    return [*names, _LAST_FONT], frozenset(characters | set(FT2Font(last).get_charmap()))


def _add_font(path: Path) -> tuple[str, set[int]]:
    """Make matplotlib know a font; gives its family and the characters that it draws."""
    try:
        fontManager.addfont(path)
        return FontProperties(fname=str(path)).get_name(), set(FT2Font(str(path)).get_charmap())
    except (RuntimeError, OSError) as error:
        raise UserError(f"font={path}: not a font that can be read: {error}") from error


def _drawn(text: str, drawable: frozenset[int]) -> str:
    """The text with a box for every character that no font has; `$` is no formula here."""
    return "".join(sign if ord(sign) in drawable else _MISSING for sign in text).replace("$", r"\$")


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED, labelcolor=_INK, length=3)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Beside the title, where nothing is drawn."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "borderaxespad": 0, "borderpad": 0.2}
    axes.legend(frameon=False, ncols=2, fontsize=8, handlelength=1.5, handletextpad=0.5, columnspacing=1, **place)


def _draw_languages(axes: Axes, statistics: Statistics) -> None:
    counts = statistics.caption_counts
    bars = axes.barh(list(counts), list(counts.values()), color=[_COLORS[name] for name in counts], height=0.4)
    axes.bar_label(bars, [f" {count:,}" for count in counts.values()], color=_INK)
    axes.set_xlim(0, 1.25 * max(counts.values()))
    axes.set_ylim(max(len(counts), 2) - 0.5, -0.5)  # room for two, so that a single bar does not fill the panel
    samples = ", ".join(f"{count:,} {name}" for name, count in statistics.sample_languages.items())
    axes.set_xlabel(f"samples: {samples}", color=_MUTED)
    axes.set_xticks([])
    _title(axes, "Captions by language")


def _draw_lengths(axes: Axes, statistics: Statistics, unit: str, limit: int | None) -> None:
    by_language = statistics.lengths.get(unit, {})
    last = 1
    for language, histogram in by_language.items():
        lengths, counts = np.array(histogram.lengths), np.array(histogram.counts)
        shares = np.zeros(int(lengths.max()) + 2)
        shares[lengths] = counts / counts.sum()
        last = max(last, int(np.searchsorted(np.cumsum(shares), _TAIL)))
        label = f"{language}, median {np.repeat(lengths, counts)[counts.sum() // 2]}"
        edges, color = np.arange(len(shares)) - 0.5, _COLORS[language]
        axes.stairs(100 * shares[:-1], edges, color=color, alpha=0.15, fill=True)
        # Dashed over a solid line, both show where they are the same.
        axes.stairs(100 * shares[:-1], edges, color=color, label=label, linewidth=1.6, linestyle=_LINES[language])
    if limit is not None and limit <= last:
        axes.axvline(limit + 0.5, color=_MUTED, linestyle="--", linewidth=1)
        axes.annotate(f" cut at {limit}", (limit + 0.5, 0.9), xycoords=("data", "axes fraction"), color=_MUTED)
    axes.set_xlim(-0.5, last + 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0)
    axes.grid(axis="y", color=_GRID)
    axes.set_ylabel("% of the captions", color=_MUTED)
    _legend(axes)
    if unit == "words":
        axes.set_xlabel("Chinese ones as jieba cuts them", color=_MUTED)
    _title(axes, f"Caption {unit}")


def _draw_sizes(axes: Axes, statistics: Statistics) -> None:
    width, height = statistics.sizes[:, 0], statistics.sizes[:, 1]
    axes.scatter(width, height, s=8, color="#0b5394", alpha=0.25, linewidths=0)
    low, high = 0.8 * statistics.sizes.min(), 1.25 * statistics.sizes.max()
    if high < 4 * low:  # at least a tick on each side
        low, high = low / 2, 2 * high
    axes.plot([low, high], [low, high], color=_GRID, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = [2**power for power in range(2, 16) if low <= 2**power <= high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("width, pixels", color=_MUTED)
    axes.set_ylabel("height, pixels", color=_MUTED)
    _title(axes, "Image sizes")


def _draw_repetition(axes: Axes, statistics: Statistics) -> None:
    places = np.arange(len(REPETITION_CLASSES))
    for shift, (name, shares) in zip((-0.2, 0.2), statistics.repeated.items(), strict=True):
        bars = axes.bar(places + shift, [100 * share for share in shares], 0.38, color=_BAR_COLORS[name], label=name)
        labels = [f"{100 * share:.0f}" if share >= 0.005 else "" for share in shares]
        axes.bar_label(bars, labels, color=_INK, fontsize=8)
    axes.set_xticks(places, REPETITION_CLASSES)
    axes.set_ylim(0, 112)
    axes.set_xlabel("times that the same one occurs", color=_MUTED)
    axes.set_ylabel("% of all", color=_MUTED)
    _legend(axes)
    _title(axes, "Exact duplicates")


def _draw_frequent(axes: Axes, captions: Sequence[tuple[str, int]], drawable: frozenset[int]) -> None:
    _title(axes, "Most frequent captions")
    if not captions:
        axes.set_axis_off()
        axes.text(0, 0.9, "no caption repeats", transform=axes.transAxes, color=_MUTED)
        return
    texts = [_drawn(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…", drawable) for text, _ in captions]
    counts = [count for _, count in captions]
    bars = axes.barh(range(len(texts)), counts, color=_BAR_COLORS["captions"], height=0.65)
    axes.bar_label(bars, [f" {count:,}" for count in counts], color=_INK, fontsize=8)
    axes.set_yticks(range(len(texts)), texts)
    axes.set_xlim(0, 1.2 * max(counts))
    axes.set_xticks([])
    axes.set_ylim(max(len(texts), _LEAST_BARS) - 0.4, -0.6)


def _caption(report: SourceReport) -> str:
    expected = report.false_negatives
    return (
        f"{report.usable:,} samples read in {report.inspected_shards:,} of {report.shards:,} shards; "
        f"{report.usable_share:.1%} usable; in a batch of {expected.batch_size:,}, {expected.share_of_rows:.1%} of the "
        f"rows have a false negative"
    )
