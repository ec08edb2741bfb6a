"""How much and how long to train, by the number of pictures: recall on others after short and long runs.

Sets are a quarter of Tux Paint's stamps, most of them, clip art with English captions (Debian's
`tuxpaint-stamps-default`, `openclipart-png` and `openclipart-svg`), and 20,000 pages that are drawn here, of three
emoji each, with their names in both languages. The first three are parts of the training sides of
`benchmarks/stamps.py` and of such a split of the clip art, so that nothing is chosen by the pictures kept apart there.
One seed; `benchmarks/stamps.py` says how far seeds differ.

    python benchmarks/adaptation_length.py --json benchmarks/results/length-MACHINE.json --document docs/adaptation.md

Recalls are mean recalls in percent, of the last step; `--quick` makes two short runs.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import _clipart
import stamps
from _common import Report, parse_arguments
from long_captions import draw_page

from m2_encoder.data.emoji.dataset import load_emoji_concepts, load_emoji_images
from m2_encoder.evaluation.tables import to_markdown

CLIPART, DRAWN = Path("outputs") / "clipart", Path("outputs") / "pages"
STYLES, PAGES = ("noto", "fluent", "openmoji"), 20_000
TUNING, FEW = Path("tuning") / "sides", Path("tuning") / "few"
SETS = {
    "stamps, a quarter": (stamps.PLACE / FEW / "train", stamps.PLACE / TUNING / "val", (50, 100)),
    "stamps": (stamps.PLACE / TUNING / "train", stamps.PLACE / TUNING / "val", (100, 300)),
    "clip art": (CLIPART / TUNING / "train", CLIPART / TUNING / "val", (100, 300)),
    "drawn pages": (DRAWN / "sides" / "train", DRAWN / "sides" / "val", (100, 300, 1000)),
}

WAYS = {"image tower locked": "adaptation=locked", "all": "adaptation=full"}


def draw_pages() -> None:
    """Pictures of three emoji each, of concepts and styles that the start knows, and a table of their names."""
    rng, rows = random.Random(0), []
    images = {style: load_emoji_images(style) for style in STYLES}
    known = [each for each in load_emoji_concepts() if each.split == "train" and {*STYLES} <= {*each.styles}]
    folder = stamps.ROOT / DRAWN / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PAGES):
        concepts, picture = rng.sample(known, 3), folder / f"{number:05d}.png"
        draw_page([images[rng.choice(STYLES)][each.key] for each in concepts]).save(picture)
        names = {language: separator.join(each.captions[language].name for each in concepts)
                 for language, separator in (("en", ", "), ("zh", "，"))}  # fmt: skip
        rows.append({"image": str(picture), "captions": names})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (stamps.ROOT / DRAWN / "pages.jsonl").write_text(lines, encoding="utf-8")


def prepare() -> None:
    """The sides of all sets, as far as they are not there."""
    stamps.prepare()
    if not (stamps.ROOT / DRAWN / "tars").is_dir():
        draw_pages()
        stamps.run("m2-data", "pack", f"source={DRAWN / 'pages.jsonl'}", f"output={DRAWN / 'tars'}")
    if not (stamps.ROOT / CLIPART / "sides").is_dir():
        _clipart.write_table(stamps.ROOT / CLIPART / "clipart.jsonl")
        stamps.run("m2-data", "pack", f"source={CLIPART / 'clipart.jsonl'}", f"output={CLIPART / 'tars'}")
    for source, output, share in (
        (DRAWN / "tars", DRAWN / "sides", 0.05),
        (CLIPART / "tars", CLIPART / "sides", 0.1),
        (CLIPART / "sides" / "train", CLIPART / TUNING, 0.1),
        (stamps.PLACE / "sides" / "train", stamps.PLACE / TUNING, 0.2),
        (stamps.PLACE / TUNING / "train", stamps.PLACE / FEW, 0.75),
    ):
        if not (stamps.ROOT / output / "split.json").is_file():
            stamps.run("m2-data", "split", f"source={source}", f"output={output}", f"val={share}")


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose table is replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("Steps of an adaptation by the size of the set", distributions=("lightning", "pillow"))
    prepare()
    table = [["pictures", "steps", "passes", "trained", "these", "known drawings"], ["---", *["--:"] * 5]]
    for name, (train, val, lengths) in list(SETS.items())[: 1 if arguments.quick else None]:
        split = json.loads((stamps.ROOT / train.parent / "split.json").read_text(encoding="utf-8"))
        pictures = split["sides"]["train"]["samples"]
        for steps, (trained, way) in itertools.product(lengths[:1] if arguments.quick else lengths, WAYS.items()):
            lines = (way, f"trainer.max_steps={steps}", "trainer.val_check_interval=50")
            called = f"{name}, {trained}, {steps}"
            summary, cost = stamps.train(called, lines, 0, quick=arguments.quick, sides=(train, val))
            found = stamps.read_means(summary)
            values = [found[dataset, "after"] for dataset in ("mine", "emoji_heldout_style")]
            row = [f"{pictures:,}, {name}", str(steps), f"{steps * 128 / pictures:.0f}", trained]
            table.append([*row, *(f"{value:.1f}" for value in values)])
            numbers = {"before": found["mine", "before"], "these": values[0], "known": values[1]}
            rounded = {key: round(value, 2) for key, value in numbers.items()}
            minutes = round(cost.core_minutes, 2)
            report.add(name, pictures=pictures, steps=steps, trained=trained, core_minutes=minutes, **rounded)
    print(to_markdown(table))
    if arguments.document is not None:
        stamps.write_section(arguments.document, "adaptation-length", table)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
