"""The report of an evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from m2_encoder.data.images.transforms import open_image
from m2_encoder.evaluation.records import Record
from m2_encoder.files import write_text
from m2_encoder.pictures import STANDARD

HEADLINES: Final = ("mean_recall", "t2i_mean_recall", "i2t_mean_recall", "top1", "map", "r@1", "linear_top1")
"""The metric of a set that stands for it in short tables and plots, the first that is there."""

_TASKS: Final = ("retrieval", "text retrieval", "classification", "probe", "geometry")
"""As they are sorted; others follow."""

_THUMBNAIL_PX: Final = 96
_JPEG_QUALITY: Final = 80
_GAP_PX: Final = 8


class ModelFacts(NamedTuple):
    """What a model is and costs; None where it is not known, as with files of features."""

    name: str
    parameters: int | None = None
    file_bytes: int | None = None
    embed_dim: int | None = None
    image_size: int | None = None
    peak_mb: float | None = None
    ms_per_image: float | None = None
    ms_per_text: float | None = None
    batch_size: int | None = None  # that the times are for


class Found(NamedTuple):
    """One query and what a model found for it."""

    query: str
    rank: int  # of the best right picture, from 1
    right: str  # thumbnail, a data URL
    found: tuple[str, ...]  # thumbnails of the first pictures found


class Gallery(NamedTuple):
    """Best and worst retrievals of a model on a set in one language."""

    model: str
    dataset: str
    language: str
    gallery_size: int
    best: Sequence[Found]
    worst: Sequence[Found]


class Row(NamedTuple):
    """A set in one language, for all models."""

    dataset: str
    subset: str
    language: str
    task: str
    protocol: str
    label_set: str
    templates: str
    metric: str
    records: Mapping[str, Record]  # by model


def write_page(
    path: Path,
    records: Sequence[Record],
    models: Sequence[ModelFacts],
    galleries: Sequence[Gallery] = (),
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes the page; `facts` are lines of its foot, `left_out` names of pictures that could not be used, by set.

    Raises:
        UserError: if it cannot be written.
    """
    import jinja2

    template = (files("m2_encoder") / "assets" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows = headline_rows(records)
    content = environment.from_string(template).render(
        title=title,
        models=models,
        rows=rows,
        pairs=language_pairs(rows),
        records=sorted(records, key=_order),
        galleries=sorted(galleries, key=lambda each: (each.model, each.dataset, order_of_language(each.language))),
        facts=facts or {},
        left_out=left_out or {},
        interval=_interval,
        remarks=dict.fromkeys(f"{each.dataset}: {each.remark}" for each in records if each.remark),
        plots=[plot for plot in (_plot(rows, models, axis) for axis in _AXES) if plot],
        number=number,
        signed=lambda value: f"{value:+.1f}".replace("-", "−"),
        human=human,
    )
    write_text(path, content.encode("utf-8", "replace").decode(), key="page")  # a caption can hold half a character


def headline_rows(records: Iterable[Record]) -> list[Row]:
    """A row for all that differs in more than model and metric, with its headline metric; in the order of records."""
    groups: dict[tuple[str, str, str, str, str, str, str], dict[str, dict[str, Record]]] = {}
    for each in records:
        place = (each.dataset, each.subset, each.language, each.task)
        key = (*place, each.protocol, each.label_set, each.templates)
        groups.setdefault(key, {}).setdefault(each.metric, {})[each.model] = each
    rows = []
    for key, metrics in groups.items():
        metric = next((name for name in HEADLINES if name in metrics), None)
        if metric is not None:
            rows.append(Row(*key, metric=metric, records=metrics[metric]))
    return sorted(rows, key=lambda row: (row.dataset, row.subset, order_of_language(row.language)))


def language_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Chinese beside English: rows of the same set that differ in the language and its names of classes alone."""
    english = {_without_language(row): row for row in rows if row.language == "en"}
    chinese = [row for row in rows if row.language.startswith("zh") and "→" not in row.language]
    found = ((row, english.get(_without_language(row))) for row in chinese)
    return [(row, other) for row, other in found if other is not None]


def _without_language(row: Row) -> tuple[Any, ...]:
    return tuple(row._replace(language="", label_set="")[:-1])


def thumbnail(image: Image.Image) -> str:
    """A picture as a small JPEG in a data URL."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_strip(found: Found) -> Image.Image:
    """The right picture, a gap, and the pictures that were found, in a row."""
    shown = [found.right, *found.found]
    strip = Image.new("RGB", (len(shown) * (_THUMBNAIL_PX + _GAP_PX) + _GAP_PX, _THUMBNAIL_PX), "white")
    for place, url in enumerate(shown):
        if not url:  # a picture that cannot be shown
            continue
        picture = open_image(base64.b64decode(url.partition(",")[2]), pictures=STANDARD)
        left = place * (_THUMBNAIL_PX + _GAP_PX) + (2 * _GAP_PX if place else 0)
        strip.paste(picture, (left + (_THUMBNAIL_PX - picture.width) // 2, (_THUMBNAIL_PX - picture.height) // 2))
    return strip


def order_of_language(language: str) -> tuple[int, str]:
    """A key that sorts Chinese first, then English, and behind all languages what is between two of them."""
    if "→" in language:
        return (3, language)
    return (0 if language.startswith("zh") else 1 if language == "en" else 2, language)


def _order(record: Record) -> tuple[Any, ...]:
    place = (_TASKS.index(record.task) if record.task in _TASKS else len(_TASKS), record.dataset, record.subset)
    return (*place, record.protocol, order_of_language(record.language))


def number(value: float | None, digits: int = 1) -> str:
    """A number with one decimal, one more below 1; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) >= 1 or not value else f"{value:.{digits + 1}f}"


def human(value: float | None) -> str:
    """A count in thousands, millions or billions."""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _interval(record: Record) -> str:
    """An interval as a drawing, 0 to 100: dot for the value, tick for chance, diamond for what was published.

    Nothing for numbers that are no percentages.
    """
    if record.task == "geometry":
        return ""
    scale = 1.2

    def x(value: float) -> str:
        return f"{6 + scale * min(100.0, max(0.0, value)):.1f}"

    parts = ['<line class="rail" x1="6" x2="126" y1="8" y2="8"/>']
    if record.low is not None and record.high is not None:
        parts.append(f'<line class="bar" x1="{x(record.low)}" x2="{x(record.high)}" y1="8" y2="8"/>')
    if record.chance is not None:
        parts.append(f'<line class="chance" x1="{x(record.chance)}" x2="{x(record.chance)}" y1="3" y2="13"/>')
    if record.published is not None:
        parts.append(f'<path class="published" d="M{x(record.published)} 3 l5 5 l-5 5 l-5 -5 z"/>')
    parts.append(f'<circle class="dot" cx="{x(record.value)}" cy="8" r="3"/>')
    return f'<svg class="interval" viewBox="0 0 132 16" width="132" height="16">{"".join(parts)}</svg>'


class Plot(NamedTuple):
    """Scores against what they cost."""

    title: str
    svg: str
    best: tuple[str, ...]  # models that no other one beats in both


_AXES: Final = (("ms_per_image", "ms per image"), ("peak_mb", "peak memory, MB"))
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 280, 46, 40


def _plot(rows: Sequence[Row], models: Sequence[ModelFacts], axis: tuple[str, str]) -> Plot | None:
    """The mean of the headline numbers against a cost, with the line of models that are beaten in neither.

    Rows of whole sets count, the first of each set, language and task, and those that all of these models have.
    """
    name, label = axis
    costs = {facts.name: float(getattr(facts, name)) for facts in models if getattr(facts, name)}
    whole = {(row.dataset, row.language, row.task): row for row in reversed(rows) if not row.subset}
    common = [row for row in whole.values() if costs.keys() <= row.records.keys()]
    if len(costs) < 2 or not common:
        return None
    points = {
        model: (cost, sum(row.records[model].value for row in common) / len(common)) for model, cost in costs.items()
    }
    best = pareto(points)
    low, high = _bounds([math.log10(cost) for cost, _ in points.values()])
    bottom, top = _bounds([score for _, score in points.values()])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (math.log10(point[0]) - low) / (high - low) * (_WIDTH - _LEFT - 130)
        y = _HEIGHT - _BOTTOM - (point[1] - bottom) / (top - bottom) * (_HEIGHT - _BOTTOM - 16)
        return round(x, 1), round(y, 1)

    line = " ".join(f"{x},{y}" for x, y in (place(points[model]) for model in best))
    shapes = [f'<polyline class="pareto" points="{line}"/>', *_scales(low, high, bottom, top, place, label)]
    for model, point in points.items():
        x, y = place(point)
        kind = "dot" if model in best else "beaten"
        shapes.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"><title>{_escape(model)}</title></circle>')
        shapes.append(f'<text x="{x + 8}" y="{y + 4}">{_escape(model)}</text>')
    svg = f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(shapes)}</svg>'
    return Plot(f"Mean of {len(common)} numbers of whole sets against {label}", svg, tuple(best))


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The models that no other one beats, from cheap to costly; `points` are (cost, score) by model.

    >>> pareto({"small": (1.0, 50.0), "slow": (3.0, 40.0), "large": (4.0, 60.0)})
    ['small', 'large']
    """
    best: list[str] = []
    for model in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not best or points[model][1] > points[best[-1]][1]:
            best.append(model)
    return best


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds all values with some room around them."""
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or 0.5
    return low - room, high + room


def _scales(low: float, high: float, bottom: float, top: float, place: Any, label: str) -> list[str]:
    """Ticks of both axes, with their labels."""
    ticks = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            ticks += [value] if low <= math.log10(value) <= high else []
    if len(ticks) < 2:  # all models cost about the same
        ticks = [10 ** (low + (high - low) * share) for share in (0.1, 0.5, 0.9)]
    shapes = [
        f'<text class="tick" x="{place((value, bottom))[0]}" y="{_HEIGHT - _BOTTOM + 16}">{value:.3g}</text>'
        for value in ticks
    ]
    step = max(0.5, round((top - bottom) / 4, 1))
    for number in range(math.ceil(bottom / step), math.floor(top / step) + 1):
        _, y = place((10**low, number * step))
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<text class="tick left" x="{_LEFT - 6}" y="{y + 4}">{number * step:g}</text>')
    shapes.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}">{_escape(label)}, logarithmic</text>'
    )
    return shapes


def _escape(text: str) -> str:
    return html.escape(text)
