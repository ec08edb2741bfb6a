"""A figure of step time and throughput over world sizes; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from m2_encoder.files import atomic_file
from m2_encoder.planning.cost import ModelCost
from m2_encoder.planning.search import Request, ScalingPoint
from m2_encoder.planning.setting import Setting
from m2_encoder.planning.step import Prediction

_INK: Final = "#1f2933"
_MUTED: Final = "#7b8794"
_GRID: Final = "#e4e7eb"
_LABEL_GAP: Final = 0.065  # of a panel's height
_HEADROOM: Final = 1.3
"""The naive head leaves the picture: the axis ends this far above the slowest of the others."""


class _Line(NamedTuple):
    """One curve: its label, colour, width, dashes, and which prediction of a point it shows."""

    label: str
    color: str
    width: float
    dashes: str
    of: Callable[[ScalingPoint], Prediction | None]


def draw_scaling(
    path: Path, scaling: Sequence[ScalingPoint], cost: ModelCost, request: Request, *, cluster: str, planned: Setting
) -> None:
    """Draw step time, and pairs per second and device, over world sizes."""
    lines = _lines(scaling)
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": _MUTED, "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.2), dpi=160, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        time_axes, rate_axes = figure.subplots(1, 2)
        ceiling = _HEADROOM * max(1e3 * item.time.total for item in _shown(scaling, lines[1:], request))
        _draw(time_axes, scaling, lines, request, lambda item: 1e3 * item.time.total, top=ceiling)
        _title(time_axes, "Time of a step, ms")
        ends = _draw(
            rate_axes, scaling, lines, request, lambda item: item.pairs_per_s / item.setting.world_size, top=None
        )
        _title(rate_axes, "Pairs per second and device")
        _label(rate_axes, ends)
        figure.suptitle(_finding(scaling, request), x=0.012, ha="left", fontsize=12, fontweight="bold", color=_INK)
        figure.supxlabel(_caption(cost, request, planned, cluster), x=0.012, ha="left", fontsize=7.5, color=_MUTED)
        with atomic_file(path, key="plot") as temporary:
            figure.savefig(temporary, format=path.suffix[1:])


def _lines(scaling: Sequence[ScalingPoint]) -> list[_Line]:
    fixed = next(point.fixed for point in scaling if point.fixed is not None).setting.group_size
    lines = [
        _Line("full logits on every rank", "#9aa5b1", 1.4, "-", lambda point: point.full_logits),
        _Line("local loss, all ranks", "#c05621", 1.8, "-", lambda point: point.local_loss),
        _Line("GBA-ITC, all ranks", "#7b93ab", 1.8, "--", lambda point: point.full),
        _Line("GBA-ITC, best group", "#0b5394", 2.6, "-", lambda point: point.best),
        _Line(f"GBA-ITC, groups of {fixed}", "#4aa3df", 1.8, "--", lambda point: point.fixed),
    ]
    return lines if any(point.fixed != point.best for point in scaling if point.fixed is not None) else lines[:-1]


def _fits(item: Prediction | None, request: Request) -> bool:
    return item is not None and item.memory.total <= request.memory_gb * 1e9


def _shown(scaling: Sequence[ScalingPoint], lines: Sequence[_Line], request: Request) -> list[Prediction]:
    """Predictions of some lines that fit; all of them if none does, so that the axes have a range."""
    items = [item for point in scaling for line in lines if (item := line.of(point)) is not None]
    return [item for item in items if _fits(item, request)] or items


def _draw(
    axes: Axes,
    scaling: Sequence[ScalingPoint],
    lines: Sequence[_Line],
    request: Request,
    value: Callable[[Prediction], float],
    *,
    top: float | None,
) -> list[tuple[float, _Line]]:
    """All lines of one panel; a cross ends those that run out of memory.

    Returns:
        The height, in 0..1, at which each line reaches the right edge.
    """
    highest = top or 1.12 * max(value(item) for item in _shown(scaling, lines, request))
    ends = []
    for line in lines:
        items = [(point.world_size, line.of(point)) for point in scaling]
        points = [(world, value(item)) for world, item in items if item is not None and _fits(item, request)]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=line.color, linewidth=line.width, linestyle=line.dashes)
        world, height = points[-1]
        if world == scaling[-1].world_size and height <= highest:
            ends.append((height / highest, line))
        else:
            _end_early(axes, points, line, highest, out_of_memory=world < scaling[-1].world_size)
    axes.set_xscale("log", base=2)
    axes.set_xlim(scaling[0].world_size, scaling[-1].world_size)
    axes.set_ylim(0, highest)
    axes.xaxis.set_major_locator(FixedLocator([point.world_size for point in scaling]))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("ranks", color=_MUTED)
    axes.tick_params(colors=_MUTED, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return ends


def _end_early(
    axes: Axes, points: Sequence[tuple[float, float]], line: _Line, highest: float, *, out_of_memory: bool
) -> None:
    """Name a line that does not reach the right edge where it ends, or leaves the picture."""
    inside = [point for point in points if point[1] <= highest] or [(points[0][0], highest)]
    note = line.label
    if out_of_memory:
        note += f"\nout of memory above {points[-1][0]:,}"
        axes.plot(*points[-1], marker="x", color=line.color, markersize=6, markeredgewidth=1.8)
    left_early, above = len(inside) < len(points) or not out_of_memory, points[-1][1] > points[0][1]
    if left_early:
        shift, side, height = (-8.0, 0.0), "right", "center"
    elif not above and inside[-1][1] < 0.2 * highest:  # the axis is near
        shift, side, height = (10.0, 0.0), "left", "center"
    else:  # rising lines leave room above them, falling ones below
        shift, side, height = (4.0, 9.0 if above else -9.0), "right", "bottom" if above else "top"
    axes.annotate(note, inside[-1], xytext=shift, textcoords="offset points", ha=side, va=height,
                  color=_MUTED, fontsize=8)  # fmt: skip


def _label(axes: Axes, ends: Sequence[tuple[float, _Line]]) -> None:
    """Names beside the lines' right ends, moved apart where they would touch."""
    below = -1.0
    for height, line in sorted(ends, key=lambda end: end[0]):
        below = max(height, below + _LABEL_GAP)
        axes.text(1.02, below, line.label, color=line.color, va="center", transform=axes.transAxes,
                  fontweight="bold" if line.width > 2 else "normal")  # fmt: skip


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, color=_INK, pad=8)


def _finding(scaling: Sequence[ScalingPoint], request: Request) -> str:
    """What the picture says, in one sentence."""
    last = scaling[-1]
    if not _fits(last.best, request):
        return f"Nothing fits into {request.memory_gb:g} GB on {last.world_size:,} ranks"
    groups = f"groups of {last.best.setting.group_size:,} take a step in {1e3 * last.best.time.total:,.0f} ms"
    if not _fits(last.local_loss, request):
        return f"{last.world_size:,} ranks: {groups}; a loss over all ranks does not fit"
    gain = 100 * (last.local_loss.time.total / last.best.time.total - 1)
    return f"{last.world_size:,} ranks: {groups}; a good loss over all ranks takes {gain:.1f} % longer"


def _caption(cost: ModelCost, request: Request, planned: Setting, cluster: str) -> str:
    return (
        f"{cost.name}, {planned.local_rows} rows a rank, {request.memory_gb:g} GB, {cluster}. All lines contrast "
        f"at least {request.contrasted_rows:,} rows (or all there are), but for the fixed group. Predicted by m2-plan."
    )
