"""Write measured numbers into README.md: a run's results and picture, and the committed benchmarks.

    python scripts/update_readme.py outputs/emoji
    python scripts/update_readme.py --pictures outputs/emoji_full/masked.png

Everything between the markers `<!-- results:begin -->` and `<!-- results:end -->` comes from the run's `summary.json`
and its export; `docs/retrieval.png` is its picture, made smaller. Between the markers of `benchmarks` stands what
`benchmarks/results/*.json` hold. Without a run only the benchmarks are written.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from m2_encoder.evaluation.metrics import RECALL_KS
from m2_encoder.evaluation.tables import CHANCE, DIRECTIONS, SPLIT_TITLES, format_percent, replace_section, to_markdown

REPO_ROOT = Path(__file__).resolve().parents[1]
MAX_PICTURE_BYTES = 600_000
_WIDTHS_PX = (2000, 1800, 1600, 1400, 1200, 1000)

_FIGURES: Mapping[str, str] = {
    "text_speedup": "text encoding: time of the plain formulas over ours",
    "time_ratio_32768": "contrastive loss, 32,768 rows: time of open_clip over ours",
    "memory_ratio_32768": "contrastive loss, 32,768 rows: peak memory of open_clip over ours",
    "time_ratio_rank_shape": "one rank of 32, 1,024 x 32,768 rows: time of open_clip over ours, one-sided",
    "cpu_ratio": "loading 5,000 JPEGs: processor time of open_clip's pipeline over ours, no workers",
    "mlm_memory_ratio": "vocabulary head, 115,244 pieces, 64 x 52 tokens: peak memory of all logits over ours",
    "speedup_official": "recall, 5,000 images x 25,010 texts: time of the official script over ours",
    "memory_ratio_clip_benchmark": "the same: peak memory of CLIP_benchmark over ours",
    "loop_ratio_clip_benchmark": "evaluating 5,000 JPEGs: processor time of CLIP_benchmark over ours",
    "onnx_speedup_text": "one text, 0.4B: time of torch over that of the exported graph on ONNX Runtime",
    "onnx_peak_gb_0_4b": "both exported graphs of 0.4B in one process: peak memory, GB",
    "comm_matches_formula": "bytes and collectives that ranks send equal the formula, in every setting counted",
}
"""The figures of the benchmarks that the README shows, and what they mean; the files hold more."""


def main() -> int:
    """Update the README; exit code 2 if the run or the README is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run, such as outputs/emoji")
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of runs, to be put into docs/, made smaller",
    )
    parser.add_argument("--readme", type=Path, default=REPO_ROOT / "README.md", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        text = arguments.readme.read_text(encoding="utf-8")
        text = replace_section(text, "benchmarks", benchmarks_section(arguments.readme.parent))
        if arguments.run is not None:
            text = replace_section(text, "results", results_section(arguments.run))
            arguments.pictures.append(arguments.run / "retrieval.png")
        for path in arguments.pictures:
            picture = shrink_picture(path)
            target = arguments.readme.parent / "docs" / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(picture)
            print(f"{target}: {len(picture) / 1e3:.0f} kB")
    except (OSError, ValueError, KeyError) as error:
        print(f"update_readme: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    arguments.readme.write_text(text, encoding="utf-8")
    print(arguments.readme)
    return 0


def results_section(run: Path) -> str:
    """Table, picture and origin of a run.

    Args:
        run: its folder, with `summary.json` and `export/`.

    Raises:
        ValueError: if `summary.json` does not tell how long all of the run took.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    done = summary["throughput"]
    # The rate is a median: a tenth is left to the others.
    if done["samples_seen"] > 1.1 * summary["wall_time_s"] * done.get("samples_per_s", math.inf):
        raise ValueError(
            f"{run}: its wall time of {summary['wall_time_s']:.0f} s is shorter than its training, so the run was "
            "continued or reported again; repeat it in one go"
        )
    minutes, seconds = divmod(round(summary["wall_time_s"]), 60)
    machine = summary["machine"]
    device = ", ".join(machine["gpus"]) or f"{machine['threads']} CPU threads, no GPU"
    revision = (summary["git_revision"] or "unknown")[:12]
    origin = (
        f"Percent. `{summary['command']}`: {count_parameters(run / 'export' / 'model.safetensors'):,} parameters, "
        f"{done['samples_seen']:,.0f} pairs seen, {minutes} min {seconds:02d} s for everything on {device}; "
        f"revision `{revision}`, torch {summary['versions']['torch']}. "
        "Source: `summary.json` and `retrieval.png` of the run. Equal scores count against the right item."
    )
    picture = "![Chinese and English queries with the five images the model ranks first](docs/retrieval.png)"
    return "\n\n".join([results_table(summary), origin, picture])


def format_figure(value: float) -> str:
    """Three digits; of large numbers all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def results_table(summary: Mapping[str, Any]) -> str:
    """Recalls by split and language, chance below them, as narrow Markdown."""
    ks = " / ".join(f"@{k}" for k in RECALL_KS)
    lines = [
        ["split", "language", *(f"{title} R{ks}" for title in DIRECTIONS.values()), "mean"],
        ["---", "---", *["--:"] * len(DIRECTIONS), "--:"],
    ]
    for split, languages in summary["table"].items():
        number = next(iter(summary["evaluation"][split].values()))["num_images"]
        first = f"{SPLIT_TITLES.get(split, split)}, {number:,.0f} images"
        for language, values in languages.items():
            cells = [" / ".join(format_percent(values[f"{way}_r@{k}"]) for k in RECALL_KS) for way in DIRECTIONS]
            cells.append(format_percent(values["mean_recall"]))
            cells = [f"*{cell}*" for cell in cells] if language == CHANCE else cells
            lines.append([first, f"*{CHANCE}*" if language == CHANCE else language, *cells])
            first = ""
    return to_markdown(lines)


def benchmarks_section(root: Path) -> str:
    """One row per figure of every committed benchmark result."""
    lines = [["measured", "figure", "machine", "file"], ["---", "--:", "---", "---"]]
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        machine = report["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        figures = report.get("figures", {})
        for key in (key for key in _FIGURES if key in figures):
            value = figures[key]
            shown = ("no", "yes")[value] if isinstance(value, bool) else format_figure(value)
            lines.append([_FIGURES[key], shown, where, f"`{path.relative_to(root)}`"])
    if len(lines) == 2:
        return "No result is committed yet; `make benchmark` measures on your machine."
    return to_markdown(lines)


def count_parameters(weights: Path) -> int:
    """Parameters of an exported model; only the header of the file is read."""
    with safe_open(weights, framework="pt") as content:
        return sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118


def shrink_picture(path: Path) -> bytes:
    """The picture as PNG of at most `MAX_PICTURE_BYTES`: fewer colours first, then fewer pixels.

    Raises:
        ValueError: if even the narrowest is too large.
    """
    with Image.open(path, formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    for width in (image.width, *(width for width in _WIDTHS_PX if width < image.width)):
        smaller = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            buffer, "PNG", optimize=True
        )
        if buffer.tell() <= MAX_PICTURE_BYTES:
            return buffer.getvalue()
    raise ValueError(f"{path}: more than {MAX_PICTURE_BYTES:,} bytes at {_WIDTHS_PX[-1]} px")


if __name__ == "__main__":
    sys.exit(main())
