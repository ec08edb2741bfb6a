"""The emoji model on pictures that it never saw, Tux Paint's stamps: what each way to adapt it gains and forgets.

The stamps are Debian's package `tuxpaint-stamps-default` (GPL), read where they are installed; tars are made of them in
outputs/stamps. `m2-data split` keeps a fifth of them apart, so that no caption or picture is on both sides. Then each
way is trained from the emoji model with three seeds (about a minute each on two quiet cores), and the forgetting table
of each run says what became of the recall on the stamps that were kept apart and on the drawings of the emoji set.

    python benchmarks/stamps.py --json benchmarks/results/stamps-MACHINE.json --document docs/adaptation.md

Rows are mean recalls in percent (both directions, at 1, 5 and 10), the mean of Chinese and English, with the spread
over seeds; `--quick` trains two ways for a few steps.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments

from m2_encoder.evaluation.sets.tuxpaint import DEBIAN_FOLDER, read_tuxpaint
from m2_encoder.evaluation.tables import replace_section, to_markdown

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("outputs") / "stamps"
START = Path("outputs") / "emoji" / "export"
LANGUAGES = {"zh_CN": "zh", "en": "en"}
SEEDS = (0, 1, 2)

WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "full, lr 1e-4": ("optimizer.lr=1.0e-4",),
    "full, lr 1e-3": ("optimizer.lr=1.0e-3",),
    "full, keep": ("objective=[itc,keep]",),
    "full, layer decay 0.7": ("optimizer.layer_decay=0.7",),
    "locked image tower": ("adaptation=locked",),
    "lora": ("adaptation=lora", "optimizer.lr=1.0e-3"),
    "last": ("adaptation=last", "optimizer.lr=1.0e-3"),
    "prompts": ("adaptation=prompts", "optimizer.lr=1.0e-3"),
    "adapters": ("adaptation=adapters", "optimizer.lr=1.0e-3"),
}
SETS = {"mine": "stamps", "emoji_heldout_style": "known drawings", "emoji_heldout_families": "unseen drawings"}


def run(command: str, *lines: str) -> None:
    """One command of the project, from the root of the checkout."""
    print(f"+ {shlex.join([command, *lines])}", flush=True)
    subprocess.run([Path(sys.executable).with_name(command), *lines], cwd=ROOT, check=True)


def write_table(path: Path) -> int:
    """The stamps with a Chinese and an English name, as a table for `m2-data pack`; returns how many."""
    dataset = read_tuxpaint(DEBIAN_FOLDER, languages=[*LANGUAGES])
    captions: dict[int, dict[str, str]] = {}
    for source, language in LANGUAGES.items():
        texts = dataset.texts[source]
        for text, picture in texts.pairs.tolist():
            captions.setdefault(picture, {})[language] = texts.rows[text]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": str(Path(DEBIAN_FOLDER) / dataset.pictures[number].name), "captions": own}
        for number, own in sorted(captions.items())
        if len(own) == len(LANGUAGES)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def prepare() -> None:
    """The start and both sides of the stamps, as far as they are not there."""
    if not (ROOT / START).is_dir():
        run("m2-train", "+experiment=emoji", "run.resume=auto", "logger=csv")
    if not (ROOT / PLACE / "sides" / "split.json").is_file():
        write_table(ROOT / PLACE / "stamps.jsonl")
        run("m2-data", "pack", f"source={PLACE / 'stamps.jsonl'}", f"output={PLACE / 'tars'}")
        run("m2-data", "split", f"source={PLACE / 'tars'}", f"output={PLACE / 'sides'}", "val=0.2")


def train(name: str, lines: Sequence[str], seed: int, *, quick: bool) -> dict[str, Any]:
    """`summary.json` of a run, which is trained if it is not there yet."""
    called = f"{name.replace(', ', '-').replace(' ', '_')}-{seed}" + ("-quick" if quick else "")
    summary = ROOT / PLACE / "runs" / called / "summary.json"
    if not summary.is_file():
        data = (
            f"data.sources.main.shards={PLACE / 'sides' / 'train'}",
            f"data.validation.mine={PLACE / 'sides' / 'val'}",
        )
        short = ("trainer.max_steps=4", "trainer.val_check_interval=2", "scheduler.warmup_steps=1") if quick else ()
        fixed = (f"run.folder={PLACE / 'runs'}", f"run.name={called}", f"seed={seed}")
        fixed += ("run.resume=auto", "run.final=last", "logger=[]")  # to choose a step by the numbers would flatter
        run("m2-train", "+experiment=adapt", f"model.weights={START}", *data, *fixed, *lines, *short)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def read_means(summary: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Mean recall of both languages by set and share."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in summary["records"]:
        if each["metric"] == "mean_recall" and each["dataset"] in SETS:
            found.setdefault((each["dataset"], each["model"]), []).append(each["value"])
    return {place: statistics.mean(values) for place, values in found.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and the largest distance of a seed from it."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {max(abs(value - mean) for value in values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose tables are replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("The emoji model on Tux Paint's stamps", distributions=("lightning", "pillow"))
    prepare()
    ways = {name: WAYS[name] for name in ("full", "full, keep")} if arguments.quick else WAYS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    table = [["", *(f"{title}" for title in SETS.values()), "minutes"], ["---", *["--:"] * (len(SETS) + 1)]]
    for name, lines in ways.items():
        summaries = [train(name, lines, seed, quick=arguments.quick) for seed in seeds]
        means = [read_means(summary) for summary in summaries]
        minutes = statistics.mean(summary["wall_time_s"] for summary in summaries) / 60
        if len(table) == 2:
            table.append(["before", *(f"{means[0][dataset, 'before']:.1f}" for dataset in SETS), ""])
        shares = [share for share in ("50 %", "after") if (next(iter(SETS)), share) in means[0]]
        for share in shares:
            values = {dataset: [each[dataset, share] for each in means] for dataset in SETS}
            label = f"`{name}`" if share == "after" else f"`{name}`, half (WiSE-FT)"
            table.append([label, *map(spread, values.values()), f"{minutes:.1f}" if share == "after" else ""])
            numbers = {
                f"{dataset} {seed}": round(value, 3)
                for dataset, own in values.items()
                for seed, value in zip(seeds, own, strict=True)
            }
            report.add(name, share=share, minutes=round(minutes, 2), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_section(text, "stamps", to_markdown(table)), encoding="utf-8")
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
