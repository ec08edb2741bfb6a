"""Loading images and captions for training, against open_clip's own pipeline.

5,000 photo-like JPEGs (39 KB on average, 256 to 512 px a side; made once, with a caption each, in 20 tars) are read
from tars in the page cache, decoded, cropped at random (area 0.9 to 1), resized to 224, tokenised and batched by 128;
no other augmentation, as is open_clip's default. open_clip's side is its `get_wds_dataset` with its transform and
tokenizer, unchanged, on the webdataset that it pins; that is another version than ours, so it runs from an environment
of its own:

    python -m venv peer
    peer/bin/pip install 'open_clip_torch[training]==3.3.0' torch==2.14.1 torchvision==0.29.1
    python benchmarks/data.py --peer-python peer/bin/python

What differs: open_clip's batches are normalised floats, ours are bytes, which the model normalises on its device;
open_clip's order is a shuffle buffer, ours a plan over all samples, from shards that are indexed.

The two sides take turns, a whole pass each. CPU time is that of a process and its workers, who have one thread each;
samples/s is wall time, start of the workers included. Without --peer-python only our side is measured.

Figures: `cpu_ratio` is open_clip's CPU time per sample over ours, without workers; `samples_per_s_0w` and
`samples_per_s_2w` are ours; `decode_floor_ratio` is our CPU time over that of decoding alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments
from _photos import make_shards

COUNT, QUICK_COUNT = 5000, 2560
ROUNDS, QUICK_ROUNDS = 3, 2
OURS, PEER = "ours", "open_clip"
LOADING = ("0 workers", "2 workers")
DECODING = "decoding alone"

_VERSIONS = """
import importlib.metadata, json
names = ("open_clip_torch", "webdataset", "torch", "torchvision", "pillow")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""


class Side:
    """A process that measures on demand.

    Args:
        python: interpreter of its environment.
        name: which side.
        folder: the tars.
        count: images in them.
    """

    def __init__(self, python: str, name: str, folder: Path, count: int) -> None:
        script = Path(__file__).with_name("_data_loaders.py")
        self.name = name
        self._process = subprocess.Popen(
            [python, str(script), name, str(folder), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def measure(self, what: str) -> dict[str, float]:
        """One pass: samples, wall_s, cpu_s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended in {what!r} with exit code {self._process.wait()}; see above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate("quit\n")


def measure(sides: list[Side], *, rounds: int) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Passes of every side and kind, in turns; the first round, in which caches fill, is not kept."""
    passes: dict[tuple[str, str], list[dict[str, float]]] = {}
    for i in range(-1, rounds):
        for what in (*LOADING, DECODING):
            for side in sides if i % 2 else reversed(sides):
                if what == DECODING and side.name == PEER:
                    continue
                result = side.measure(what)
                if i >= 0:
                    passes.setdefault((side.name, what), []).append(result)
    return passes


def add_rows(report: Report, passes: Mapping[tuple[str, str], list[dict[str, float]]]) -> None:
    """Medians and extremes."""
    for (side, what), results in passes.items():
        cpu = [1e3 * each["cpu_s"] / each["samples"] for each in results]
        report.add(
            f"{side}, {what}",
            cpu_ms_per_sample=round(statistics.median(cpu), 3),
            min_cpu_ms=round(min(cpu), 3),
            max_cpu_ms=round(max(cpu), 3),
            samples_per_s=round(statistics.median(each["samples"] / each["wall_s"] for each in results), 1),
            samples=int(results[0]["samples"]),
            rounds=len(results),
        )


def cpu_ratio(above: list[dict[str, float]], below: list[dict[str, float]]) -> float:
    """Median over rounds of one CPU time per sample over another: both of a round saw the same machine."""
    return statistics.median(
        (a["cpu_s"] / a["samples"]) / (b["cpu_s"] / b["samples"]) for a, b in zip(above, below, strict=True)
    )


def add_figures(report: Report, passes: Mapping[tuple[str, str], list[dict[str, float]]]) -> None:
    """What the README may quote."""
    alone, two = LOADING
    if (PEER, alone) in passes:
        report.figures["cpu_ratio"] = cpu_ratio(passes[PEER, alone], passes[OURS, alone])
        report.figures["cpu_ratio_2w"] = cpu_ratio(passes[PEER, two], passes[OURS, two])
    for key, what in (("samples_per_s_0w", alone), ("samples_per_s_2w", two)):
        report.figures[key] = statistics.median(each["samples"] / each["wall_s"] for each in passes[OURS, what])
    report.figures["decode_floor_ratio"] = cpu_ratio(passes[OURS, alone], passes[OURS, DECODING])


def _add_arguments(parser: Any) -> None:
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter of open_clip's environment (see above)")
    cache = Path(tempfile.gettempdir()) / "m2-encoder-benchmark"
    parser.add_argument("--cache", type=Path, default=cache, metavar="PATH", help="keeps the images (%(default)s)")


def main() -> None:
    arguments = parse_arguments(__doc__, configure=_add_arguments)
    count, rounds = (QUICK_COUNT, QUICK_ROUNDS) if arguments.quick else (COUNT, ROUNDS)
    folder = make_shards(arguments.cache, count=count, processes=arguments.threads)
    facts = json.loads((folder / "photos.json").read_text())
    report = Report(
        f"Loading {count:,} JPEGs of {facts['mean_kb']:.1f} KB", distributions=("simplejpeg", "pillow", "sentencepiece")
    )
    sides = [Side(sys.executable, OURS, folder, count)]
    if arguments.peer_python:
        found = subprocess.run([arguments.peer_python, "-c", _VERSIONS], check=True, capture_output=True, text=True)
        report.versions.update({f"peer's {name}": version for name, version in json.loads(found.stdout).items()})
        sides.append(Side(arguments.peer_python, PEER, folder, count))
    try:
        passes = measure(sides, rounds=rounds)
    finally:
        for side in sides:
            side.close()
    add_rows(report, passes)
    add_figures(report, passes)
    if not arguments.peer_python:
        print("Only our side was measured: --peer-python PATH adds open_clip's, see --help", file=sys.stderr)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
