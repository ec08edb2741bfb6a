"""What each objective adds at equal steps: runs of +experiment=emoji_full with different objectives and seeds.

Each run is a process of `m2-train`, seeds outermost, so that every mixture meets the same hours of the machine; same
steps, same batch, same everything but `objective` and `seed`. The paired difference of a number is that of a seed's run
to the run of the same seed with [itc] alone. Validation during training is left out; the sets of the report are
measured whole at the end, hidden words and patches as docs/objectives.md says.

The full measurement takes hours, the time of a dozen runs. With `--json PATH` finished runs are kept in PATH.partial,
and the same command goes on where it was stopped:

    python benchmarks/objective_mixtures.py --json benchmarks/results/objective_mixtures-xeon-2c.json
    python benchmarks/objective_mixtures.py --markdown

The second writes the committed results into docs/objectives.md and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from _common import Report, parse_arguments
from _journal import Journal
from _mixtures import BASE, SECONDS, SECTION, SETS, collect, render_committed, summarize

from m2_encoder.evaluation.tables import replace_section

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "objectives.md"
RUNS = ROOT / "outputs" / "objective_mixtures"
MIXTURES = (BASE, "itc,cmlm", "itc,cmim", "itc,cmlm,cmim")
QUICK_MIXTURES = (BASE, "itc,cmlm,cmim")
QUICK_STEPS, QUICK_BATCH = 20, 32
_ERROR_LINES = 15


class Table(dict[str, Any]):
    """A figure with many numbers: whole in JSON, counted on the terminal, where the tables show it."""

    def __str__(self) -> str:
        return f"{len(self)} mixtures, in the table above"


def list_overrides(mixture: str, *, seed: int, steps: int, quick: bool) -> list[str]:
    """What a run is told beside its experiment.

    Args:
        mixture: objectives, with commas.
        seed: of everything.
        steps: optimizer steps.
        quick: a smaller batch.
    """
    lines = [f"objective=[{mixture}]", f"seed={seed}", f"trainer.max_steps={steps}"]
    lines += [f"trainer.val_check_interval={steps}", "trainer.limit_val_batches=0", f"run.checkpoint_every={steps}"]
    lines += ["logger=csv", "run.export=false", "trainer.accelerator=cpu"]
    if quick:
        lines += [f"data.global_batch_size={QUICK_BATCH}", "scheduler.warmup_steps=5"]
    return lines


def start(name: str, overrides: Sequence[str], *, threads: int) -> subprocess.Popen[bytes]:
    """A run from its start, whatever an interrupted one left."""
    shutil.rmtree(RUNS / name, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    places = [f"run.name={name}", f"run.folder={RUNS.relative_to(ROOT)}"]
    command = [sys.executable, "-m", "m2_encoder.cli.train", "+experiment=emoji_full", *places, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (RUNS / f"{name}.log").open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def read(name: str, code: int) -> dict[str, Any]:
    """The summary of a run that has ended.

    Raises:
        SystemExit: if it failed, with the end of what it said.
    """
    if code:
        lines = (RUNS / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"{name} failed with exit code {code}:", *lines[-_ERROR_LINES:], sep="\n", file=sys.stderr)
        raise SystemExit(1)
    summary: dict[str, Any] = json.loads((RUNS / name / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(RUNS / name / "checkpoints", ignore_errors=True)
    return summary


def hash_code() -> str:
    """Digest of the code and the configurations: a journal of other ones counts for nothing."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def measure(arguments: Any, journal: Journal, mixtures: Sequence[str]) -> None:
    """All runs that the journal lacks, some at a time; they end with this process."""
    pairs = [(seed, mixture) for seed in arguments.seeds for mixture in mixtures]
    todo = [(seed, mixture) for seed, mixture in pairs if f"{mixture} {seed}" not in journal.found]
    running: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        while todo or running:
            while todo and len(running) < arguments.at_once:
                seed, mixture = todo.pop(0)
                name = f"{mixture.replace(',', '-')}-{seed}"
                overrides = list_overrides(mixture, seed=seed, steps=arguments.steps, quick=arguments.quick)
                print(f"{name} starts, {len(todo)} to come …", file=sys.stderr, flush=True)
                running[f"{mixture} {seed}"] = name, start(name, overrides, threads=arguments.threads)
            time.sleep(0.2)
            for key, (name, process) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    journal.add(key, describe(read(name, process.returncode)))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def describe(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the journal keeps of a run's summary."""
    done = summary["throughput"]
    return {
        "numbers": collect(summary),
        "batch": round(done["samples_seen"] / done["step"]),
        "wall_time_s": summary["wall_time_s"],
        "git_revision": summary["git_revision"],
    }


def fill(report: Report, journal: Journal, mixtures: Sequence[str], seeds: Sequence[int], *, steps: int) -> None:
    """A row per mixture, and all numbers as figures."""
    entries = {(mixture, seed): journal.found[f"{mixture} {seed}"] for mixture in mixtures for seed in seeds}
    found = summarize({m: {seed: entries[m, seed]["numbers"] for seed in seeds} for m in mixtures})
    for mixture, numbers in found["mixtures"].items():
        report.add(f"[{mixture}]", **_shorten(numbers))
    for mixture, numbers in found["differences"].items():
        report.add(f"[{mixture}] less [{BASE}]", **_shorten(numbers))
    report.figures |= {
        "steps": steps,
        "seeds": list(seeds),
        "batch": next(iter(entries.values()))["batch"],
        "git_revision": next(iter(entries.values()))["git_revision"],
        "wall_time_s": sum(float(entry["wall_time_s"]) for entry in entries.values()),
        **{name: Table(values) for name, values in found.items()},
    }


def _shorten(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Means under the names of a narrow table: recalls and time."""
    shown = {name.replace(split, place): name for place, split in zip(("val", "style", "concepts"), SETS, strict=True)
             for name in numbers if name.startswith(split) and ("R@" in name or "recall" in name)}  # fmt: skip
    return {short: float(numbers[name]["mean"]) for short, name in {**shown, "s/step": SECONDS}.items()}


def read_default_steps() -> int:
    """Those of the experiment."""
    experiment = yaml.safe_load((ROOT / "conf" / "experiment" / "emoji_full.yaml").read_text(encoding="utf-8"))
    return int(experiment["trainer"]["max_steps"])


def add_arguments(parser: Any) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help="of each run (default: those of emoji_full)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="first the one whose runs come first (default: 0 1 2)"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each with --threads; their times then differ",
    )
    parser.add_argument("--markdown", action="store_true", help="write committed results into docs/objectives.md")


def main() -> None:
    arguments = parse_arguments(__doc__, configure=add_arguments)
    if arguments.markdown:
        text = replace_section(DOCUMENT.read_text(encoding="utf-8"), SECTION, render_committed(ROOT))
        DOCUMENT.write_text(text, encoding="utf-8")
        print(DOCUMENT.relative_to(ROOT))
        return
    arguments.seeds = list(dict.fromkeys(arguments.seeds or ([0] if arguments.quick else [0, 1, 2])))
    arguments.steps = arguments.steps or (QUICK_STEPS if arguments.quick else read_default_steps())
    mixtures = QUICK_MIXTURES if arguments.quick else MIXTURES
    report = Report("objectives of emoji_full, equal steps", distributions=("lightning",))
    unfinished = None if arguments.json is None else arguments.json.with_name(arguments.json.name + ".partial")
    identity = {"steps": arguments.steps, "threads": arguments.threads, "quick": arguments.quick, "code": hash_code()}
    journal = Journal(unfinished, {**identity, **report.versions, "cpu": report.machine["cpu"]})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run of the moment ends with this process
    try:
        measure(arguments, journal, mixtures)
    except KeyboardInterrupt:
        print("stopped; the same command with --json goes on with the run that was stopped", file=sys.stderr)
        raise SystemExit(130) from None
    fill(report, journal, mixtures, arguments.seeds, steps=arguments.steps)
    report.finish(json_path=arguments.json)
    journal.remove()


if __name__ == "__main__":
    main()
