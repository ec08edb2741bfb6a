"""Is fine-tuning worth it? Stamps of Tux Paint by class: the emoji model as it is, baselines on its features, training.

Classes are the 17 folders of Debian's `tuxpaint-stamps-default`. `m2-data split by=picture` keeps 30 % of the pictures
apart; `m2-evaluate evaluation=[probe]` measures the start on them (zero-shot, and classifiers on frozen features of all
training pictures), then each way of training is measured by names of classes alone, with three seeds.

    python benchmarks/stamp_classes.py --json benchmarks/results/classes-MACHINE.json --document docs/adaptation.md

Numbers are top-1 accuracies in percent, with the spread over seeds; `--quick` trains one way for a few steps.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments
from stamps import ROOT, SEEDS, START, Cost, run, spread, write_section

from m2_encoder.evaluation.sets.tuxpaint import DEBIAN_FOLDER
from m2_encoder.evaluation.tables import to_markdown

PLACE = Path("outputs") / "stamp_classes"
NAMES = {
    "animals": ("动物", "animal"),
    "cartoon": ("卡通", "cartoon"),
    "clothes": ("衣服", "clothes"),
    "food": ("食物", "food"),
    "hobbies": ("爱好", "hobby"),
    "household": ("家居用品", "household item"),
    "medical": ("医疗", "medicine"),
    "military": ("军事", "military"),
    "naturalforces": ("自然力量", "forces of nature"),
    "people": ("人", "people"),
    "plants": ("植物", "plant"),
    "seasonal": ("节日", "holiday decoration"),
    "space": ("太空", "outer space"),
    "sports": ("运动", "sports"),
    "symbols": ("符号", "symbol"),
    "town": ("城镇", "town"),
    "vehicles": ("交通工具", "vehicle"),
}
WAYS = {
    "full": ("adaptation=full",),
    "locked image tower": ("adaptation=locked",),
    "lora": ("adaptation=lora", "optimizer.lr=1.0e-3"),
}
FIELDS = ("metric", "protocol", "language")  # of records
COLUMNS = {
    "names, zh": ("top1", "", "zh"),
    "names, en": ("top1", "", "en"),
    "k-NN": ("top1_all", "knn", ""),
    "linear probe": ("top1_all", "linear", ""),
    "CLAP, zh": ("top1_all", "clap", "zh"),
}


def prepare() -> None:
    """Tars of both sides for training, and folders of the same pictures for the evaluation."""
    if (ROOT / PLACE / "test").is_dir():
        return
    (ROOT / PLACE).mkdir(parents=True, exist_ok=True)
    lines = ("\t".join((folder, *names)) for folder, names in NAMES.items())
    (ROOT / PLACE / "names.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = f"classes={PLACE / 'names.txt'}"
    run("m2-data", "pack", f"source={DEBIAN_FOLDER}", f"output={PLACE / 'tars'}", named)
    run("m2-data", "split", f"source={PLACE / 'tars'}", f"output={PLACE / 'sides'}", "val=0.3", "by=picture")
    for side, folder in {"train": "train", "val": "test"}.items():
        unpack(ROOT / PLACE / "sides" / side, ROOT / PLACE / "unpacked" / folder)
    for folder in ("train", "test"):
        (ROOT / PLACE / "unpacked" / folder).rename(ROOT / PLACE / folder)


def unpack(tars: Path, output: Path) -> None:
    """The pictures of tars, in folders by class."""
    for sample in read_samples(tars):
        key = json.loads(sample.pop(".json"))["key"]
        for suffix, content in sample.items():
            target = output / key.split("/")[0] / (key.replace("/", "_") + suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def read_samples(tars: Path) -> Iterator[dict[str, bytes]]:
    """Files of each sample by suffix."""
    for path in sorted(tars.glob("*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        for name, content in _read_members(path):
            stem, _, suffix = name.partition(".")
            found.setdefault(stem, {})[f".{suffix}"] = content
        yield from found.values()


def _read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        for member in archive:
            opened = archive.extractfile(member)
            if opened is not None:
                yield member.name, opened.read()


def measure(model: Path, output: Path) -> dict[str, float]:
    """Top-1 by the columns of the table."""
    if not (ROOT / output).is_file():
        own = {"path": "test", "train": "train", "labels": "names.txt"}
        lines = [f"evaluation.probe.sets.own.{key}={PLACE / name}" for key, name in own.items()]
        lines += ["evaluation.probe.shots=[16]", f"output={output}"]
        run("m2-evaluate", "evaluation=[probe]", f"model={model}", *lines)
    records = json.loads((ROOT / output).read_text(encoding="utf-8"))["records"]
    found = {tuple(each.get(field, "") for field in FIELDS): each["value"] for each in records}
    return {column: found[place] for column, place in COLUMNS.items()}


def train(name: str, seed: int, *, quick: bool) -> tuple[Path, Cost]:
    """Folder of a run, which is trained if it is not there yet, and what that took."""
    called = f"{name.replace(' ', '_')}-{seed}" + ("-quick" if quick else "")
    folder = PLACE / "runs" / called
    paid = ROOT / folder / "cost.json"
    if not paid.is_file():
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        data = (f"data.sources.main.shards={PLACE}/sides/train", f"data.validation.mine={PLACE}/sides/val")
        fixed = (f"run.folder={PLACE / 'runs'}", f"run.name={called}", f"seed={seed}", "run.final=last", "logger=[]")
        short = ("trainer.max_steps=4", "trainer.val_check_interval=2", "scheduler.warmup_steps=1") if quick else ()
        lines = (*data, *fixed, *WAYS[name], *short)
        cost = run("m2-train", "+experiment=adapt", f"model.weights={START}", *lines)
        paid.write_text(json.dumps(cost._asdict()), encoding="utf-8")
    return folder, Cost(**json.loads(paid.read_text(encoding="utf-8")))


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose table is replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("The emoji model on classes of Tux Paint's stamps", distributions=("lightning", "pillow"))
    prepare()
    start = measure(START, PLACE / "start.json")
    table = [["", *COLUMNS, "core-minutes"], ["---", *["--:"] * (len(COLUMNS) + 1)]]
    table.append(["as it is", *(f"{value:.1f}" for value in start.values()), ""])
    report.add("as it is", core_minutes=0.0, **{f"{key} 0": round(value, 2) for key, value in start.items()})
    for name in ["locked image tower"] if arguments.quick else WAYS:
        runs = [train(name, seed, quick=arguments.quick) for seed in (SEEDS[:1] if arguments.quick else SEEDS)]
        found = [measure(folder / "export", folder / "probe.json") for folder, _ in runs]
        minutes = statistics.mean(cost.core_minutes for _, cost in runs)
        values = {column: [each[column] for each in found] for column in COLUMNS}
        table.append([f"`{name}`", *map(spread, values.values()), f"{minutes:.1f}"])
        numbers = {f"{column} {seed}": round(each[column], 2) for seed, each in enumerate(found) for column in COLUMNS}
        report.add(name, core_minutes=round(minutes, 2), **numbers)
    print(to_markdown(table))
    if arguments.document is not None:
        write_section(arguments.document, "stamp-classes", table)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
