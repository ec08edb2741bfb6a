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
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import Report, parse_arguments

from m2_encoder.evaluation.sets.tuxpaint import DEBIAN_FOLDER, read_tuxpaint
from m2_encoder.evaluation.tables import replace_section, to_markdown

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("outputs") / "stamps"
TRAIN, VAL = PLACE / "sides" / "train", PLACE / "sides" / "val"
START = Path("outputs") / "emoji" / "export"
LANGUAGES = {"zh_CN": "zh", "en": "en"}
SEEDS = (0, 1, 2)

WAYS: dict[str, tuple[str, ...]] = {
    "full": ("adaptation=full",),
    "full, keep": ("adaptation=full", "objective=[itc,keep]"),
    "full, layer decay 0.7": ("adaptation=full", "optimizer.layer_decay=0.7"),
    "locked image tower": ("adaptation=locked",),
    "lora": ("adaptation=lora", "optimizer.lr=1.0e-3"),
    "last": ("adaptation=last", "optimizer.lr=1.0e-3"),
    "prompts": ("adaptation=prompts", "optimizer.lr=1.0e-3"),
    "adapters": ("adaptation=adapters", "optimizer.lr=3.0e-3"),
    "mixture": ("adaptation=mixture", "objective=[itc,routing]", "optimizer.lr=1.0e-3"),
}
SHARES = {
    "after": "",
    "75 %": None,
    "50 %": ", half (WiSE-FT)",
    "25 %": None,
    "before": None,
}  # those of a name are shown
LINES = ("full", "lora", "locked image tower")  # of which the weights between start and end are reported
SETS = {"mine": "stamps", "emoji_heldout_style": "known drawings", "emoji_heldout_families": "unseen drawings"}


class Cost(NamedTuple):
    """What a command took."""

    core_minutes: float  # of all threads together: other work on the machine hardly changes it
    peak_gb: float  # of the process, imports included


def run(command: str, *lines: str) -> Cost:
    """One command of the project, from the root of the checkout."""
    print(f"+ {shlex.join([command, *lines])}", flush=True)
    started = subprocess.Popen([Path(sys.executable).with_name(command), *lines], cwd=ROOT)
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"{command} ended with {started.returncode}")
    return Cost((used.ru_utime + used.ru_stime) / 60, used.ru_maxrss * 1024 / 1e9)


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


def train(
    name: str, lines: Sequence[str], seed: int, *, quick: bool, sides: tuple[Path, Path] = (TRAIN, VAL)
) -> tuple[dict[str, Any], Cost]:
    """`summary.json` of a run, which is trained if it is not there yet, and what that took."""
    called = f"{name.replace(', ', '-').replace(' ', '_')}-{seed}" + ("-quick" if quick else "")
    folder = ROOT / PLACE / "runs" / called
    paid = folder / "cost.json"
    if not paid.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        data = (f"data.sources.main.shards={sides[0]}", f"data.validation.mine={sides[1]}")
        short = ("trainer.max_steps=4", "trainer.val_check_interval=2", "scheduler.warmup_steps=1") if quick else ()
        fixed = (f"run.folder={PLACE / 'runs'}", f"run.name={called}", f"seed={seed}")
        fixed += ("run.final=last", "logger=[]")  # to choose a step by these numbers would flatter
        cost = run("m2-train", "+experiment=adapt", f"model.weights={START}", *data, *fixed, *lines, *short)
        paid.write_text(json.dumps(cost._asdict()), encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return dict(summary), Cost(**json.loads(paid.read_text(encoding="utf-8")))


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


def write_section(document: Path, name: str, table: Sequence[Sequence[str]]) -> None:
    """Replace a table in a document."""
    text = document.read_text(encoding="utf-8")
    document.write_text(replace_section(text, name, to_markdown(table)), encoding="utf-8")


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose tables are replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("The emoji model on Tux Paint's stamps", distributions=("lightning", "pillow"))
    prepare()
    ways = {name: WAYS[name] for name in ("full", "last")} if arguments.quick else WAYS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    table = [["", *SETS.values(), "core-minutes", "peak GB"], ["---", *["--:"] * (len(SETS) + 2)]]
    for name, lines in ways.items():
        runs = [train(name, lines, seed, quick=arguments.quick) for seed in seeds]
        means = [read_means(summary) for summary, _ in runs]
        minutes = statistics.mean(cost.core_minutes for _, cost in runs)
        memory = statistics.mean(cost.peak_gb for _, cost in runs)
        if len(table) == 2:
            table.append(["before", *(f"{means[0][dataset, 'before']:.1f}" for dataset in SETS), "", ""])
        for share, label in SHARES.items() if name in LINES else [("after", "")]:
            values = {dataset: [each[dataset, share] for each in means] for dataset in SETS}
            if label is not None:
                costs = [f"{minutes:.1f}", f"{memory:.2f}"] if share == "after" else ["", ""]
                table.append([f"`{name}`{label}", *map(spread, values.values()), *costs])
            numbers = {
                f"{dataset} {seed}": round(value, 3)
                for dataset, own in values.items()
                for seed, value in zip(seeds, own, strict=True)
            }
            report.add(name, share=share, core_minutes=round(minutes, 2), peak_gb=round(memory, 3), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        write_section(arguments.document, "stamps", table)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
