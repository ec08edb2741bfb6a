"""Draw who imports whom in `src/m2_encoder`: docs/architecture.png, and the table of docs/architecture.md.

    python scripts/draw_architecture.py

Both are read off the import statements; tests/unit/test_import_graph.py holds the code to `LEVELS`. Needs the `plot`
extra.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Final, NamedTuple

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = "m2_encoder"

LEVELS: Final[tuple[dict[str, str], ...]] = (
    {
        "types": "batches, features, languages",
        "errors": "what a user can mend",
        "bounds": "what an argument may be",
        "files": "files, whole or not at all",
        "record": "revision, versions, machine",
        "pictures": "what the pixels of a picture are",
        "assets": "drawings, captions, font",
    },
    {
        "distributed": "contrastive groups of ranks, collectives",
        "models": "the encoder: vision, text, vision-language experts",
        "tokenizers": "SentencePiece, whole words by jieba",
    },
    {
        "objectives": "losses, and the passes of the model that they share",
        "strategies": "one device, DDP, FSDP2, with groups",
        "planning": "memory, traffic, time of a step",
        "checkpoints": "official and own formats, exports, model cards",
    },
    {"data": "shards, order, samples, images, masks, loading"},
    {"hub": "load(), list_models()"},
    {
        "evaluation": "metrics, tasks, models and their features, the suite, pictures",
    },
    {
        "training": "one step, optimizers, adaptation, callbacks",
        "curation": "what is dropped before training",
        "config": "from the command line to a checked configuration",
    },
    {
        "search": "trials of a search for good values",
        "picture_search": "indexes of people's pictures, and queries",
    },
    {"exports": "formats of other tools, and whether they give our features"},
    {"runs": "the life of a training run", "serving": "a search page, and what immich and MT-Photos ask"},
    {"analysis": "runs as data, for notebooks"},
    {"cli": "m2-train, m2-evaluate, m2-export, m2-embed, m2-search, m2-serve, m2-plan, m2-data"},
)
"""From below: by layer, what is in it. A layer imports itself and layers of earlier lines, and what `BESIDE` adds."""

BESIDE: Final = frozenset(
    {("types", "errors"), ("files", "errors"), ("bounds", "errors"), ("pictures", "errors"), ("__init__", "hub")}
)
"""Imports within a line: (who, whom)."""

LEVEL_OF: Final = {layer: level for level, layers in enumerate(LEVELS) for layer in layers}
FACADE: Final = "__init__"
"""`m2_encoder/__init__.py`, which exports names of other layers when they are asked for."""

_INK, _PALE, _LINE = "#1f2933", "#eef3f8", "#9fb3c8"
_ACCENT = "#0b4f9c"


class Import(NamedTuple):
    """One import statement: where it stands, and the dotted name that it asks for."""

    line: int
    target: str


def read_imports(path: Path, module: str, root: Path) -> Iterator[Import]:
    """Every import of a file at any depth, as absolute names; `from a import b` is a.b if that is a module.

    Args:
        path: of the file.
        module: its dotted name.
        root: the folder of the package.
    """
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            source = base if node.level else node.module or ""
            for alias in node.names:
                inner = root.parent.joinpath(*source.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield Import(node.lineno, f"{source}.{alias.name}" if is_module else source)


def list_modules(root: Path) -> Iterator[tuple[Path, str]]:
    """Every source file below a package's folder, with its dotted name."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield path, ".".join([PACKAGE, *parts]).removesuffix(".__init__")


def layer_of(module: str) -> str:
    """The layer of a module's dotted name: `objectives` for `m2_encoder.objectives.base`."""
    return [*module.split("."), FACADE][1]


def count_edges(root: Path) -> Counter[tuple[str, str]]:
    """How many import statements of one layer name another, by (who, whom)."""
    edges: Counter[tuple[str, str]] = Counter()
    for path, module in list_modules(root):
        for _, target in read_imports(path, module, root):
            if target.split(".")[0] == PACKAGE and layer_of(module) != layer_of(target):
                edges[layer_of(module), layer_of(target)] += 1
    return edges


def count_lines(root: Path) -> dict[str, tuple[int, int]]:
    """Files and lines of each layer; empty files do not count."""
    found: dict[str, tuple[int, int]] = {}
    for path, module in list_modules(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        files, total = found.get(layer_of(module), (0, 0))
        found[layer_of(module)] = (files + (lines > 0), total + lines)
    return found


def make_table(root: Path) -> str:
    """The table of docs/architecture.md: from above, each layer, what is in it, and what it imports."""
    edges = count_edges(root)
    rows = ["| layer | holds | imports |", "|---|---|---|"]
    for layers in reversed(LEVELS):
        for layer, what in layers.items():
            imported = sorted(
                (other for who, other in edges if who == layer and other in LEVEL_OF), key=lambda x: -LEVEL_OF[x]
            )
            rows.append(f"| `{layer}` | {what} | {' '.join(f'`{other}`' for other in imported) or '–'} |")
    return "\n".join(rows)


def draw(path: Path, root: Path) -> None:
    """Boxes by level, arrows from a layer to those that it imports."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    edges, sizes = count_edges(root), count_lines(root)
    figure, axes = plt.subplots(figsize=(12.5, 1.55 * len(LEVELS)), dpi=110)
    places: dict[str, tuple[float, float]] = {}
    for level, layers in enumerate(LEVELS):
        for index, layer in enumerate(layers):
            places[layer] = ((index + 0.5) / len(layers) * 12.0, level * 1.3)
    half = {layer: min(1.42, 12.0 / len(LEVELS[level]) / 2 - 0.08) for layer, level in LEVEL_OF.items()}
    for who, whom in sorted(keep_direct({edge for edge in edges if _is_downward(*edge)})):
        if LEVEL_OF.get(whom, 0) > 0 and who in places:
            _draw_arrow(axes, places[who], places[whom])
    for layer, (x, y) in places.items():
        _draw_box(axes, layer, x, y, half[layer], *sizes.get(layer, (0, 0)))
    axes.set_xlim(-0.1, 12.1)
    axes.set_ylim(-0.75, (len(LEVELS) - 1) * 1.3 + 0.95)
    axes.axis("off")
    axes.text(
        0, (len(LEVELS) - 1) * 1.3 + 0.92, "Who imports whom: from above to below, never back",
        fontsize=13, weight="bold", color=_INK, va="top",
    )  # fmt: skip
    note = (
        "Left out: arrows that follow from others, and those to the lowest line, which every layer uses. "
        "Strategies are named by configurations alone."
    )
    axes.text(0, -0.72, note, fontsize=8.5, color="#52606d")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def keep_direct(edges: Set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others: of cli → runs → training and cli → training, the last is left out."""
    below: dict[str, set[str]] = {}
    for who, whom in edges:
        below.setdefault(who, set()).add(whom)

    def reaches(start: str, end: str) -> bool:
        return start == end or any(reaches(each, end) for each in below.get(start, ()))

    return {(a, b) for a, b in edges if not any(reaches(each, b) for each in below[a] if each != b)}


def _is_downward(who: str, whom: str) -> bool:
    return LEVEL_OF.get(whom, -1) < LEVEL_OF.get(who, -1) or (who, whom) in BESIDE


def _draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    levels = round((start[1] - end[1]) / 1.3)
    bend = 0.0 if levels <= 1 else 0.08 * levels if end[0] >= start[0] else -0.08 * levels
    axes.annotate(
        "", (end[0], end[1] + 0.4), (start[0], start[1] - 0.4),
        arrowprops={
            "arrowstyle": "-|>", "color": _LINE, "linewidth": 1.5, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0,
            "shrinkB": 0, "mutation_scale": 14,
        },
    )  # fmt: skip


def _draw_box(axes: Any, layer: str, x: float, y: float, half: float, files: int, lines: int) -> None:
    import textwrap

    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (x - half, y - 0.38), 2 * half, 0.76, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor=_PALE,
        edgecolor=_ACCENT, linewidth=1.2, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(x, y + 0.22, layer, ha="center", va="center", fontsize=11, weight="bold", color=_ACCENT, zorder=4)
    size = f"{files} files, {lines:,} lines" if files > 1 else f"{lines:,} lines" if lines else ""
    what = "\n".join(textwrap.wrap(LEVELS[LEVEL_OF[layer]][layer], int(24 * half)))
    axes.text(x, y - 0.03, what, ha="center", va="center", fontsize=7.6, color=_INK, zorder=4, linespacing=1.1)
    axes.text(x, y - 0.29, size, ha="center", va="center", fontsize=7, color="#52606d", zorder=4)


def replace_table(document: str, table: str) -> str:
    """A document with the table between its two markers replaced."""
    begin, end = "<!-- imports:begin -->", "<!-- imports:end -->"
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main() -> None:
    """Write both."""
    root = REPO_ROOT / "src" / PACKAGE
    draw(REPO_ROOT / "docs" / "architecture.png", root)
    page = REPO_ROOT / "docs" / "architecture.md"
    page.write_text(replace_table(page.read_text(encoding="utf-8"), make_table(root)), encoding="utf-8")


if __name__ == "__main__":
    main()
