"""Evaluation: retrieval from features, a gallery of a million, and the loop of a whole evaluation.

Ours against CLIP_benchmark's recall code and the metric code of the official script: 5,000 images and 25,010 texts of
width 768 (the size of COCO's test set; random features, each text near its image), R@1, R@5, R@10 both ways. All take
turns within one process, with the same threads; they must agree before anything is reported. Figures are of our
recalls; another row has the whole measure, with 95 % intervals. Peak memory is what a call takes above what the process
held before, features not counted; the official script's tables of right answers are made beforehand.

The peers are their own code where a checkout is given, and otherwise what they compute, written again without the work
that they do besides (see `_retrieval_peers.py`); rows say which:

    git clone https://github.com/LAION-AI/CLIP_benchmark
    git clone https://github.com/alipay/Ant-Multi-Modal-Framework
    python benchmarks/evaluation.py --clip-benchmark CLIP_benchmark --official Ant-Multi-Modal-Framework

Beside that, 1,000 queries against a million gallery items of width 256 in fp16: time, and peak memory with the gallery.

The loop of a whole evaluation, by a model of 224 px: 5,000 photo-like JPEGs in a web dataset, with five captions each,
are read, decoded, encoded and ranked, by us and by CLIP_benchmark's own loop, in CPU seconds on one thread. It takes
the checkout, or the installed package, and is left out without either.

--quick takes 1,000 images, 5,002 texts and 100 queries, and 200 pictures for the loop; its figures are not those of the
whole, least of all the loop's, where ranking grows with the square of the set.

Figures: `speedup_official` is the official script's time over ours, `memory_ratio_clip_benchmark` CLIP_benchmark's peak
over ours, `speedup_clip_benchmark` and `memory_ratio_official` the other two; `million_peak_gb`;
`loop_ratio_clip_benchmark` is CLIP_benchmark's CPU time over ours.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import PeakMemory, Report, interleave, parse_arguments, speedup
from _evaluation_loop import (
    clip_benchmark_loop,
    export_random,
    find_clip_benchmark,
    measure_cpu,
    one_thread,
    our_loop,
    write_web_dataset,
)
from _photos import make_shards
from _retrieval_peers import Recalls, clip_benchmark_recall, official_recall
from torch import Tensor
from torch.nn.functional import normalize

from m2_encoder.evaluation.measures.ranks import rank_queries
from m2_encoder.evaluation.measures.retrieval import measure_retrieval
from m2_encoder.evaluation.metrics import retrieval_metrics

DIM, CAPTIONS, EXTRA = 768, 5, 0.002  # every 500th image has a sixth caption
IMAGES, QUICK_IMAGES, QUICK_PICTURES = 5000, 1000, 200
NOISE = 9.0  # texts find their image first in a quarter of the cases
MILLION, MILLION_DIM = 1_000_000, 256
# The official script prints one decimal; a query that rounding of fp32 decides is a hundredth of a percent.
AGREEMENT = 0.061
OURS, MEASURE, CLIP_BENCHMARK, OFFICIAL = "ours", "ours, with intervals", "CLIP_benchmark", "official script"


def make_features(num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts, and the image of each text."""
    torch.manual_seed(0)
    images = normalize(torch.randn(num_images, DIM), dim=1)
    extra = torch.arange(int(num_images * EXTRA)) * int(1 / EXTRA)
    pictures = torch.cat([torch.arange(num_images).repeat_interleave(CAPTIONS), extra]).sort().values
    texts = normalize(images[pictures] + NOISE * DIM**-0.5 * torch.randn(len(pictures), DIM), dim=1)
    return images, texts, pictures


def build_candidates(arguments: Any, num_images: int) -> dict[str, Callable[[], Recalls]]:
    """Calls that do the whole work, by label."""
    images, texts, pictures = make_features(num_images)
    pairs = torch.stack([torch.arange(len(texts)), pictures], dim=1)
    table = np.zeros((len(texts), len(images)))
    table[np.arange(len(texts)), pictures.numpy()] = 1
    table_back = np.ascontiguousarray(table.T)
    wide_images, wide_texts = images.double().numpy(), texts.double().numpy()
    theirs = clip_benchmark_recall(arguments.clip_benchmark)
    official = official_recall(arguments.official)

    def measure() -> Recalls:
        return {found.metric: found.value for found in measure_retrieval(images, texts, pairs).measurements}

    return {
        OURS: lambda: retrieval_metrics(images, torch.arange(num_images), texts, pictures),
        MEASURE: measure,
        CLIP_BENCHMARK: lambda: theirs(images, texts, pictures),
        OFFICIAL: lambda: official(wide_texts, wide_images, table, table_back),
    }


def check_agreement(found: dict[str, Recalls], *, tolerance: float = AGREEMENT) -> None:
    """Refuses to compare what is not the same, within so many percent."""
    for label in found.keys() - {OURS}:
        for name, value in found[label].items():
            if not abs(value - found[OURS][name]) < tolerance:
                ours = found[OURS][name]
                raise SystemExit(f"{name}: ours {ours:.3f}, {label} {value:.3f}: the comparison means nothing")


def measure_recalls(report: Report, arguments: Any) -> None:
    """Peak memory in a call of each, which also checks agreement; then times in turns."""
    for call in build_candidates(arguments, 100).values():
        call()  # what is loaded once is nobody's peak
    candidates = build_candidates(arguments, QUICK_IMAGES if arguments.quick else IMAGES)
    found, peaks = {}, {}
    for label, call in candidates.items():
        peak = PeakMemory()
        with peak.measure():
            found[label] = call()
        peaks[label] = peak.bytes
    check_agreement(found)
    timings = interleave(candidates, rounds=3 if arguments.quick else 5, warmup=0)
    given = {OURS: True, MEASURE: True, CLIP_BENCHMARK: arguments.clip_benchmark, OFFICIAL: arguments.official}
    for label, timing in timings.items():
        report.add(
            label if given[label] else f"{label}, by definition",
            **timing.row(),
            peak_mb=round(peaks[label] / 1e6, 1),
            mean_recall=round(sum(found[label][f"{way}_r@{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)) / 6, 2),
        )
    report.figures["speedup_official"] = speedup(timings[OFFICIAL], timings[OURS])
    report.figures["memory_ratio_clip_benchmark"] = peaks[CLIP_BENCHMARK] / peaks[OURS]
    report.figures["speedup_clip_benchmark"] = speedup(timings[CLIP_BENCHMARK], timings[OURS])
    report.figures["memory_ratio_official"] = peaks[OFFICIAL] / peaks[OURS]


def measure_million(report: Report, *, queries: int) -> None:
    """A gallery of a million, which lies in fp16 and is compared in fp32."""
    generator = torch.Generator().manual_seed(1)
    peak = PeakMemory()
    with peak.measure():
        gallery = torch.empty(MILLION, MILLION_DIM, dtype=torch.float16)
        for part in gallery.split(10_000):
            part.copy_(normalize(torch.randn(part.shape, generator=generator), dim=1))
        rows = torch.arange(queries) * (MILLION // queries)
        asked = gallery[rows].float() + 0.1 * torch.randn(queries, MILLION_DIM, generator=generator)
        pairs = torch.stack([torch.arange(queries), rows], dim=1)
        recalls = []
        timing = interleave({OURS: lambda: recalls.append(rank_queries(asked, gallery, pairs).recall(1))}, rounds=1)
    report.add(
        f"{queries:,} queries, a million items by {MILLION_DIM}",
        **timing[OURS].row(),
        peak_with_gallery_mb=round(peak.bytes / 1e6, 1),
        recall_at_1=round(recalls[0], 1),
    )
    report.figures["million_peak_gb"] = peak.bytes / 1e9


def measure_loop(report: Report, arguments: Any) -> None:
    """Whole evaluations; a first round of each, which is not measured, shows that they agree."""
    peer = find_clip_benchmark(arguments.clip_benchmark)
    if peer is None:
        print("The loop is left out: CLIP_benchmark is not installed; give --clip-benchmark FOLDER.")
        return
    count = QUICK_PICTURES if arguments.quick else IMAGES
    photos = make_shards(arguments.cache, count=count, processes=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, data = export_random(Path(folder)), write_web_dataset(Path(folder), photos)
        loops = {OURS: lambda: our_loop(model, data), CLIP_BENCHMARK: lambda: clip_benchmark_loop(peer, model, data)}
        with one_thread():
            check_agreement({label: loop() for label, loop in loops.items()}, tolerance=200 / count)  # two pictures
        seconds = measure_cpu(loops, rounds=1 if arguments.quick else 3)
    for label, values in seconds.items():
        report.add(f"{label}, whole loop, {count:,} pictures", cpu_s=round(statistics.median(values), 2))
    pairs = zip(seconds[CLIP_BENCHMARK], seconds[OURS], strict=True)
    report.figures["loop_ratio_clip_benchmark"] = statistics.median(theirs / ours for theirs, ours in pairs)


def _add_arguments(parser: Any) -> None:
    cache = Path(tempfile.gettempdir()) / "m2-encoder-benchmark"
    parser.add_argument("--cache", type=Path, default=cache, metavar="PATH", help="keeps the pictures (%(default)s)")
    parser.add_argument("--clip-benchmark", type=Path, metavar="FOLDER", help="a checkout of CLIP_benchmark")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of the official repository")


def main() -> None:
    arguments = parse_arguments(__doc__, configure=_add_arguments)
    report = Report(f"Evaluation, {arguments.threads} threads", distributions=("numpy", "clip_benchmark"))
    measure_recalls(report, arguments)
    measure_million(report, queries=100 if arguments.quick else 1000)
    measure_loop(report, arguments)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
