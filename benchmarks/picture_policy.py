"""What the decode policy of pictures is worth: recall on pictures with transparent parts, by policy.

The pictures are those of Debian's package `tuxpaint-stamps-default` that have a Chinese and an English caption: 713
PNGs, photographs and drawings, many on a transparent ground. They are read where they are installed
(`apt install tuxpaint-stamps-default`) and worked on below outputs/: their licence is the GPL, no part of them is here.

For every seed `m2-data split` holds 20 % of them out, without a picture or caption on both sides. Measured there: a
model trained on emoji as it is (zero-shot), and fine-tuned on the other 80 % by `m2-train`. Each once with the policy
`older` (orientation obeyed, alpha dropped, levels clipped: what training did before there were policies) and once with
`standard` (transparent parts on white, levels scaled); splits, seeds and steps are the same.

    make train
    python benchmarks/picture_policy.py --json benchmarks/results/picture_policy-MACHINE.json
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "outputs" / "picture_policy"
STAMPS = Path("/usr/share/tuxpaint/stamps")
POLICIES = ("older", "standard")
LANGUAGES = ("zh", "en")
TRAINING = (
    "+experiment=emoji",
    "data=webdataset",
    "data.global_batch_size=64",
    "data.lanes=1",
    "optimizer.lr=3e-4",
    "optimizer.matrix_lr=3e-3",
    "logger=csv",
)
_ERROR_LINES = 15


def list_stamps(folder: Path) -> Iterator[tuple[str, Path, dict[str, list[str]]]]:
    """Name, PNG and captions of every stamp with both languages.

    The first line of a stamp's text is English, the others are `<locale>.utf8=<text>`.
    """
    for picture in sorted(folder.rglob("*.png")):
        described = picture.with_suffix(".txt")
        if described.is_file():
            english, *others = described.read_text(encoding="utf-8").splitlines()
            chinese = [line.partition("=")[2] for line in others if line.startswith("zh_CN.utf8=")]
            if english.strip() and chinese:
                yield picture.relative_to(folder).with_suffix("").as_posix(), picture, {"zh": chinese, "en": [english]}


def run(command: str, *words: str, threads: int) -> None:
    """One command of the project; ends this process if it fails.

    Raises:
        SystemExit: with the end of what it said.
    """
    print("…", command, *words, file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [Path(sys.executable).with_name(command), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(*done.stdout.splitlines()[-_ERROR_LINES:], sep="\n", file=sys.stderr)
        raise SystemExit(1)


def pack(stamps: Path, *, threads: int) -> int:
    """The pictures as tars in `WORK`; how many there are."""
    shutil.rmtree(WORK, ignore_errors=True)
    number = 0
    for name, picture, captions in list_stamps(stamps):
        path = WORK / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, path.with_suffix(".png"))
        path.with_suffix(".json").write_text(json.dumps({"captions": captions}, ensure_ascii=False), encoding="utf-8")
        number += 1
    run("m2-data", "pack", str(WORK / "pictures"), f"output={WORK / 'tars'}", threads=threads)
    return number


def evaluate(model: Path, data: Path, policy: str, *, threads: int) -> dict[str, float]:
    """Mean recall by language, percent."""
    output = WORK / "numbers.json"
    words = [f"model={model}", f"data={data}", f"pictures={policy}", f"output={output}", "overwrite=true"]
    run("m2-evaluate", *words, threads=threads)
    (numbers,) = json.loads(output.read_text(encoding="utf-8"))["evaluation"].values()
    return {language: numbers[language]["mean_recall"] for language in LANGUAGES}


def fine_tune(model: Path, split: Path, policy: str, *, seed: int, steps: int, threads: int) -> Path:
    """The export of a run that starts from the model and trains on a split."""
    name = f"{policy}-{seed}"
    run(
        "m2-train",
        *TRAINING,
        f"run.name={name}",
        f"run.folder={WORK / 'runs'}",
        f"seed={seed}",
        f"trainer.max_steps={steps}",
        f"scheduler.warmup_steps={max(1, steps // 10)}",
        f"trainer.val_check_interval={steps}",
        f"data.sources.main.shards={split / 'train'}",
        f"model.weights={model / 'model.safetensors'}",
        f"model.pictures={policy}",
        threads=threads,
    )
    return WORK / "runs" / name / "export"


def add_arguments(parser: Any) -> None:
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/emoji/export", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of fine-tuning (default: %(default)s)")


def main() -> None:
    arguments = parse_arguments(__doc__, configure=add_arguments)
    for path, how in ((arguments.stamps, "apt install tuxpaint-stamps-default"), (arguments.model, "make train")):
        if not path.is_dir():
            raise SystemExit(f"{path}: no such folder; {how}, or name another one")
    seeds, steps = (arguments.seeds[:1], 20) if arguments.quick else (arguments.seeds, arguments.steps)
    threads = arguments.threads
    report = Report("recall of held-out stamps by decode policy, percent", distributions=("pillow", "lightning"))
    report.figures["pictures"] = pack(arguments.stamps, threads=threads)
    found: dict[tuple[str, str, str], list[float]] = {}
    for seed in seeds:
        split = WORK / f"split-{seed}"
        run("m2-data", "split", str(WORK / "tars"), f"output={split}", "val=0.2", f"seed={seed}", threads=threads)
        for policy in POLICIES:
            tuned = fine_tune(arguments.model, split, policy, seed=seed, steps=steps, threads=threads)
            for what, model in (("zero-shot", arguments.model), ("fine-tuned", tuned)):
                numbers = evaluate(model, split / "val", policy, threads=threads)
                report.add(f"{what}, {policy}", seed=seed, **numbers)
                for language, value in numbers.items():
                    found.setdefault((what, policy, language), []).append(value)
    for (what, policy, language), values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        report.add(f"{what}, {policy}: {language}", mean=statistics.fmean(values), deviation=spread, seeds=len(values))
        report.figures[f"{what.replace('-', '_')}_{policy}_{language}"] = statistics.fmean(values)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
