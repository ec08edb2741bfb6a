"""Longer captions: the emoji model on pages of three drawings, described at length, and what short texts lose by it.

A page has one large drawing and two small ones. Its long caption names all three with their keywords, the large one
first; its short caption is the name of the large one. Training pages show known concepts in three styles; pages that
are kept apart show known concepts in the style that the model never saw, each large drawing on four pages, which are
all right for its name. The emoji model reads 24 tokens, and of a longer text the last ones.

    python benchmarks/long_captions.py --threads 1 --json RESULT.json --document docs/adaptation.md

Rows are mean recalls in percent (both directions, at 1, 5 and 10), the mean of Chinese and English, with the spread
over three seeds: of pages by long and by short captions, and of single drawings by the short captions that the model
knew. `--quick` trains two ways for a few steps.
"""

from __future__ import annotations

import io
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments
from PIL import Image

from m2_encoder.data.emoji.dataset import EmojiConcept, load_emoji_concepts, load_emoji_images
from m2_encoder.evaluation.tables import replace_section, to_markdown

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("outputs") / "long_captions"
HELDOUT_STYLE = "twemoji"
STYLES = ("noto", "fluent", "openmoji")
TRAIN_PAGES, LARGE, PAGES_OF_EACH = 1200, 100, 4
SIDE, LARGE_SIDE, SMALL_SIDE = 96, 64, 32
STEPS, BATCH = 60, 64
SEEDS = (0, 1, 2)

STRETCH = ("model.context_length=96", "model.stretch_positions=8")
WAYS: dict[str, tuple[str, ...]] = {
    "itc, cut at 24 tokens": (),
    "itc, stretched to 96": STRETCH,
    "long, stretched": (*STRETCH, "data.captions.short=name", "objective=[long]"),
}
SETS = {"mine": "pages by long captions", "short": "pages by short captions", "emoji_heldout_style": "single drawings"}
PHRASES = {
    "en": ("{0}, {1}. Below on the left: {2}, {3}. Below on the right: {4}, {5}.", ", "),
    "zh": ("{0}，{1}。左下方：{2}，{3}。右下方：{4}，{5}。", "，"),
}


def describe(concepts: Sequence[EmojiConcept], language: str) -> str:
    """All drawings of a page, with their keywords."""
    phrase, separator = PHRASES[language]
    parts: list[str] = []
    for concept in concepts:
        own = concept.captions[language]
        parts += [own.name, separator.join(own.keywords) or own.name]
    return phrase.format(*parts)


def draw_page(drawings: Sequence[bytes]) -> Image.Image:
    """A large drawing in the middle above, two small ones in the corners below; RGB on white."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    middle, below = (SIDE - LARGE_SIDE) // 2, SIDE - SMALL_SIDE
    places = ((middle, 0, LARGE_SIDE), (0, below, SMALL_SIDE), (below, below, SMALL_SIDE))
    for content, (left, top, side) in zip(drawings, places, strict=True):
        drawing = Image.open(io.BytesIO(content), formats=("PNG", "WEBP")).convert("RGB")
        page.paste(drawing.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return page


def write_pages(name: str, pages: Sequence[Sequence[EmojiConcept]], styles: Sequence[str], rng: random.Random) -> None:
    """Pictures, and a table for each kind of caption; `NAME.jsonl` has both kinds, as training wants them."""
    folder = ROOT / PLACE / name
    folder.mkdir(parents=True, exist_ok=True)
    images = {style: load_emoji_images(style) for style in styles}
    rows: dict[str, list[dict[str, Any]]] = {name: [], f"{name}_long": [], f"{name}_short": []}
    for number, concepts in enumerate(pages):
        drawings = [images[rng.choice([style for style in styles if each.key in images[style]])] for each in concepts]
        picture = folder / f"{number:05d}.png"
        draw_page([own[each.key] for own, each in zip(drawings, concepts, strict=True)]).save(picture)
        long = {language: [{"text": describe(concepts, language), "role": "rewritten"}] for language in PHRASES}
        short = {language: [{"text": concepts[0].captions[language].name, "role": "name"}] for language in PHRASES}
        both = {language: long[language] + short[language] for language in PHRASES}
        rows[name].append({"image": str(picture), "captions": both})
        rows[f"{name}_long"].append({"image": str(picture), "captions": long})
        rows[f"{name}_short"].append({"image": str(picture), "captions": short, "identity": concepts[0].key})
    for table, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (ROOT / PLACE / f"{table}.jsonl").write_text(text, encoding="utf-8")


def prepare() -> None:
    """Both sides, as far as they are not there."""
    if (ROOT / PLACE / "tars").is_dir():
        return
    rng = random.Random(0)
    known = [
        each for each in load_emoji_concepts() if each.split == "train" and {*STYLES, HELDOUT_STYLE} <= {*each.styles}
    ]
    write_pages("train", [rng.sample(known, 3) for _ in range(TRAIN_PAGES)], STYLES, rng)
    large = [each for each in rng.sample(known, LARGE) for _ in range(PAGES_OF_EACH)]
    write_pages("val", [[each, *rng.sample(known, 2)] for each in large], [HELDOUT_STYLE], rng)
    run("m2-data", "pack", f"source={PLACE / 'train.jsonl'}", f"output={PLACE / 'tars'}")


def run(command: str, *lines: str) -> None:
    """One command of the project, from the root of the checkout."""
    print(f"+ {shlex.join([command, *lines])}", flush=True)
    subprocess.run([Path(sys.executable).with_name(command), *lines], cwd=ROOT, check=True)


def train(start: Path, name: str, lines: Sequence[str], seed: int, *, quick: bool) -> dict[str, Any]:
    """`summary.json` of a run, which is trained if it is not there yet."""
    called = f"{name.replace(', ', '-').replace(' ', '_')}-{seed}" + ("-quick" if quick else "")
    summary = ROOT / PLACE / "runs" / called / "summary.json"
    if not summary.is_file():
        data: tuple[str, ...] = (
            f"data.sources.main.shards={PLACE / 'tars'}",
            f"data.validation.mine={PLACE / 'val_long.jsonl'}",
            f"+data.validation.short={PLACE / 'val_short.jsonl'}",
            "data.captions.role_weights={rewritten: 1}",
            "data.transform.scale=[1.0,1.0]",  # what is cut off would be described
            "data.transform.flip=0",  # left and right are
        )
        steps = 2 if quick else STEPS
        fixed: tuple[str, ...] = (
            f"run.folder={PLACE / 'runs'}",
            f"run.name={called}",
            f"seed={seed}",
            "run.resume=auto",
            "adaptation=full",
        )
        fixed += (
            f"data.global_batch_size={BATCH}",
            "data.num_workers=0",
            "run.final=last",
            "run.export=false",
            "logger=[]",
            "callbacks=[default]",
        )
        fixed += (
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps}",
            f"scheduler.warmup_steps={steps // 10}",
        )
        fixed += ("evaluation.forgetting.measures=[retrieval]", "evaluation.forgetting.shares=[0,1]")
        run("m2-train", "+experiment=adapt", f"model.weights={start}", *data, *fixed, *lines)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def read_means(summary: dict[str, Any], share: str) -> dict[str, float]:
    """Mean recall of both languages by set."""
    found: dict[str, list[float]] = {name: [] for name in SETS}
    for each in summary["records"]:
        if each["metric"] == "mean_recall" and each["dataset"] in SETS and each["model"] == share:
            found[each["dataset"]].append(each["value"])
    return {name: statistics.mean(values) for name, values in found.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and the largest distance of a seed from it."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {max(abs(value - mean) for value in values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose table is replaced")
        parser.add_argument("--start", type=Path, default=Path("outputs/emoji/export"), metavar="FOLDER")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("The emoji model on longer captions", distributions=("lightning", "pillow"))
    prepare()
    ways = {name: WAYS[name] for name in list(WAYS)[::2]} if arguments.quick else WAYS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    found = {
        (name, seed): train(arguments.start, name, lines, seed, quick=arguments.quick)
        for seed in seeds
        for name, lines in ways.items()
    }
    table = [["", *SETS.values(), "minutes"], ["---", *["--:"] * (len(SETS) + 1)]]
    first, last = next(iter(ways)), list(ways)[-1]
    for label, name in (("before, cut at 24 tokens", first), ("before, stretched to 96", last)):
        before = read_means(found[name, seeds[0]], "before")
        table.append([label, *(f"{value:.1f}" for value in before.values()), ""])
        report.add(label, **{key: round(value, 3) for key, value in before.items()})
    for name in ways:
        runs = [found[name, seed] for seed in seeds]
        means = [read_means(each, "after") for each in runs]
        minutes = statistics.mean(each["wall_time_s"] for each in runs) / 60
        table.append([f"`{name}`", *(spread([own[key] for own in means]) for key in SETS), f"{minutes:.1f}"])
        numbers = {f"{key} {seed}": round(own[key], 3) for key in SETS for seed, own in zip(seeds, means, strict=True)}
        report.add(name, minutes=round(minutes, 2), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_section(text, "long_captions", to_markdown(table)), encoding="utf-8")
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
