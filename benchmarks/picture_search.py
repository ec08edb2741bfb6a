"""Search in an index: time of a query, alone and with eight clients at once, by type of the features and way of search.

Features are random: 64 directions mixed into 512 numbers, with noise, so that a graph of neighbours has work to do.
Recall is of the first ten, against a product of all in fp64. Times are of the search alone, and of what a query does
after it is encoded (`find_results`: search, and where the list ends). The graph needs the extra `usearch`.

    python benchmarks/picture_search.py --json benchmarks/results/picture_search-MACHINE.json
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _common import Report, parse_arguments

from m2_encoder.picture_search.index import FORMAT, INDEX_FILE, VERSION, IndexModel, PictureIndex, open_index
from m2_encoder.picture_search.results import find_results
from m2_encoder.picture_search.update import write_neighbours

PICTURES = 50_000
WIDTH = 512
DIRECTIONS = 64
CLIENTS = 8
K = 60


def make_index(folder: Path, features: npt.NDArray[np.float32], dtype: str, *, graph: bool) -> PictureIndex:
    """An index of features without pictures."""
    folder.mkdir()
    np.save(folder / "features-0.npy", features.astype(dtype))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "root": str(folder),
        "model": IndexModel("none", None, None, "standard", "")._asdict(),
        "features": "features-0.npy",
        "neighbours": write_neighbours(folder, "features-0.npy") if graph else None,
        "skipped": [],
        "names": [f"{number:07}.jpg" for number in range(len(features))],
        "sizes": [1] * len(features),
        "times": [1] * len(features),
    }
    (folder / INDEX_FILE).write_text(json.dumps(content), encoding="utf-8")
    return open_index(folder)


def make_features(number: int, seed: int) -> npt.NDArray[np.float32]:
    mixed = np.random.default_rng(0).normal(size=(DIRECTIONS, WIDTH)) / DIRECTIONS**0.5
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(number, DIRECTIONS)) @ mixed + 0.3 * rng.normal(size=(number, WIDTH))
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), dtype=np.float32)


def time_calls(call: Callable[[int], object], number: int, clients: int) -> tuple[float, float, float]:
    """Median and 99th percentile of a call in milliseconds, and calls a second, with clients that wait for nobody."""

    def timed(i: int) -> float:
        start = time.perf_counter()
        call(i)
        return 1e3 * (time.perf_counter() - start)

    for i in range(4):
        call(i)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = list(pool.map(timed, range(number)))
    elapsed = time.perf_counter() - start
    return statistics.median(times), statistics.quantiles(times, n=100)[98], number / elapsed


def main() -> None:
    arguments = parse_arguments(__doc__)
    calls = 60 if arguments.quick else 400
    report = Report(f"search in {PICTURES:,} x {WIDTH} features", distributions=("numpy", "usearch"))
    features, queries = make_features(PICTURES, 1), make_features(calls, 2)
    exact = np.argsort(-(queries[:60].astype(np.float64) @ features.T.astype(np.float64)), axis=1)[:, :10]
    kinds = [("float32", False), ("float16", False)]
    if importlib.util.find_spec("usearch") is not None:
        kinds.append(("float16", True))
    with tempfile.TemporaryDirectory() as folder:
        for dtype, graph in kinds:
            start = time.perf_counter()
            index = make_index(Path(folder) / f"{dtype}-{graph}", features, dtype, graph=graph)
            built = time.perf_counter() - start
            found = index.search(queries[:60], 10)[1]
            recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
            way = "graph" if graph else "all compared"

            def search(i: int, index: PictureIndex = index) -> object:
                return index.search(queries[i : i + 1], K)

            def answer(i: int, index: PictureIndex = index) -> object:
                return find_results(index, queries[i], K, query="")

            for what, call in (("search", search), ("answer", answer)):
                for clients in (1, CLIENTS):
                    median, slow, rate = time_calls(call, calls, clients)
                    report.add(
                        f"{dtype}, {way}, {what}", clients=clients, p50_ms=round(median, 2), p99_ms=round(slow, 2),
                        per_s=round(rate, 1), recall_at_10=round(100 * float(recall), 2),
                        megabytes=round(sum(path.stat().st_size for path in index.path.iterdir()) / 1e6, 1),
                        written_s=round(built, 1),
                    )  # fmt: skip
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
