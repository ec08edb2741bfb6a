"""Curation from end to end: time per stage and peak memory, local and on Ray, against a known truth.

Makes a crawl of a million pairs (3.6 GB) with planted faults and copies, curates it with each executor, compares
the outputs byte for byte, and counts what fell against what was planted. Times leave out what the processes were
suspended; processor time is the figure that a busy machine changes least.

    python benchmarks/curation.py --quick
    python benchmarks/curation.py --pairs 1000000 --executors local ray --json results.json
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import Report, parse_arguments
from benchmarks._curation_data import (
    MAX_REPEATS,
    MIN_SIDE_PX,
    PAIRS_PER_SHARD,
    PLAIN,
    WriteShard,
    expected_repeats,
    write_crawl_shard,
    write_evaluation_images,
)
from benchmarks._family import FamilyMeter, Reading
from m2_encoder.curation.executors import Executor, LocalExecutor
from m2_encoder.curation.pipeline import Curation, curate
from m2_encoder.curation.ray_executor import RayExecutor
from m2_encoder.curation.settings import CurationSettings, LengthLimit
from m2_encoder.curation.sources import list_shards
from m2_encoder.data.shards.index import INDEX_SUFFIX
from m2_encoder.data.worker_pool import map_in_processes

QUICK_PAIRS = 20_000
SETTINGS = CurationSettings(
    lengths={"zh": LengthLimit(least=5), "en": LengthLimit(least=5)},
    languages=("zh", "en"),
    min_side_px=MIN_SIDE_PX,
    max_repeats=MAX_REPEATS,
)


def make_crawl(folder: Path, pairs: int, *, workers: int) -> Counter[str]:
    """Write the crawl, or the rest of it; gives what is planted in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        WriteShard(str(folder / f"{start // PAIRS_PER_SHARD:06d}.tar"), start, min(PAIRS_PER_SHARD, pairs - start))
        for start in range(0, pairs, PAIRS_PER_SHARD)
    ]
    planted: Counter[str] = Counter()
    for fates in map_in_processes(write_crawl_shard, tasks, workers=workers, preload="benchmarks._curation_data"):
        planted += fates
    return planted


def run_executor(
    name: str, executor: Executor, crawl: Path, evaluation: Path, output: Path, report: Report
) -> Curation:
    """Curate with one executor and add a row per stage."""
    shutil.rmtree(output, ignore_errors=True)  # of an earlier run in the same folder
    starts: dict[str, Reading] = {}
    with FamilyMeter() as meter:

        def note(stage: str, _done: int, _total: int) -> None:
            starts.setdefault(stage, meter.read())

        before = meter.read()
        shards = list_shards({"crawl": str(crawl)})
        result = curate(shards, output, SETTINGS, executor=executor, evaluation=[str(evaluation)], progress=note)
        after = meter.read()
        executor.close()
    ends = [*list(starts.values())[1:], after]  # a stage lasts until the next one starts
    stages = {stage.stage: stage for stage in result.stages}
    for (stage, start), end in zip(starts.items(), ends, strict=True):
        report.add(
            f"{name}: {stage}",
            tasks=stages[stage].tasks,
            seconds=round(end.seconds - start.seconds, 2),
            cpu_s=round(end.cpu_s - start.cpu_s, 1),
            peak_of_a_process_mb=round(stages[stage].peak_bytes / 1e6, 1),
        )
    pairs, seconds, cpu_s = result.report.total["pairs"], after.seconds - before.seconds, after.cpu_s - before.cpu_s
    report.add(
        f"{name}: all",
        seconds=round(seconds, 1),
        cpu_s=round(cpu_s, 1),
        cpu_ms_per_pair=round(1e3 * cpu_s / pairs, 3),
        pairs_per_s=round(pairs / seconds),
        peak_of_all_mb=round(meter.peak / 1e6),
        suspended_s=round(meter.stopped_s, 1),
    )
    report.figures[f"seconds_{name}"] = round(seconds, 1)
    report.figures[f"cpu_s_{name}"] = round(cpu_s, 1)
    report.figures[f"pairs_per_s_{name}"] = round(pairs / seconds)
    report.figures[f"peak_gb_{name}"] = round(meter.peak / 1e9, 2)
    return result


def compare_with_truth(report: Report, result: Curation, planted: Counter[str], pairs: int) -> None:
    """A row per reason: planted, fallen; and the worst relative difference."""
    expected = dict(planted)
    expected["repeated_caption"] = expected_repeats(pairs)
    expected["kept"] = expected.pop(PLAIN) + planted["repeated_caption"] - expected["repeated_caption"]
    found = {**result.report.total["reasons"], "kept": result.report.total["kept_pairs"]}
    for reason in sorted({*expected, *found}):
        report.add(f"truth: {reason}", planted=expected.get(reason, 0), found=found.get(reason, 0))
    report.figures["misjudged_share"] = (
        sum(abs(expected.get(reason, 0) - found.get(reason, 0)) for reason in {*expected, *found}) / 2 / pairs
    )


def hash_outputs(output: Path) -> dict[str, str]:
    """Hash of every file of an output, by name; not of indexes, which know when their tar was written."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.suffix != INDEX_SUFFIX)
    return {str(path.relative_to(output)): _hash(path) for path in files}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """A folder for crawl and outputs: a new one, removed at the end, unless one is given."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="curation-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _configure(parser: Any) -> None:
    parser.add_argument("--pairs", type=int, default=1_000_000, help="size of the crawl (default: %(default)s)")
    parser.add_argument("--executors", nargs="+", choices=("local", "ray"), default=["local", "ray"])
    parser.add_argument(
        "--folder", type=Path, help="where to work, leave everything and find the crawl again; default: a temporary one"
    )


def main() -> None:
    arguments = parse_arguments(__doc__, configure=_configure)
    pairs = min(arguments.pairs, QUICK_PAIRS) if arguments.quick else arguments.pairs
    report = Report(f"Curation of {pairs:,} pairs, {arguments.threads} processes", distributions=("pyarrow", "ray"))
    with working_folder(arguments.folder) as folder:
        crawl, evaluation = folder / f"crawl-{pairs}", folder / f"evaluation-{pairs}"
        started = time.perf_counter()
        planted = make_crawl(crawl, pairs, workers=arguments.threads)
        write_evaluation_images(evaluation, pairs)
        size = sum(path.stat().st_size for path in crawl.glob("*.tar"))
        report.add("make the crawl", seconds=round(time.perf_counter() - started, 1), gb=round(size / 1e9, 2))
        hashes = []
        for name in arguments.executors:
            executor: Executor = (
                RayExecutor(workers=arguments.threads) if name == "ray" else LocalExecutor(arguments.threads)
            )
            result = run_executor(name, executor, crawl, evaluation, folder / name, report)
            hashes.append(hash_outputs(folder / name))
        compare_with_truth(report, result, planted, pairs)
        if len(hashes) > 1:
            report.figures["identical"] = all(other == hashes[0] for other in hashes)
            report.figures["files_compared"] = len(hashes[0])
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
