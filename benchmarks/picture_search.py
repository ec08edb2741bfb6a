"""Search in an index: time of a query, alone and with eight clients at once, by type of the features and way of search.

Features are random: 64 directions mixed into 512 numbers, with noise, so that a graph of neighbours has work to do.
Recall is of the first ten, against a product of all in fp64. Times are of the search alone, and of what a query does
after it is encoded (`find_results`: search, and where the list ends). The graph needs the extra `usearch`.

With the extra `serve`, `m2-serve` answers words over HTTP, too, in a process of its own: clients, each with one
connection, share the cores with it, and a time is from the request to the last byte of the answer. Its model is small
and has random weights, so that encoding of the words takes little of it. Before that, the first pictures of eight
queries must be those that NumPy finds.

    python benchmarks/picture_search.py --json benchmarks/results/picture_search-MACHINE.json
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _common import Report, parse_arguments

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.picture_search.index import FORMAT, INDEX_FILE, VERSION, IndexModel, PictureIndex, open_index
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.results import find_results
from m2_encoder.picture_search.update import write_neighbours
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

PICTURES = 50_000
WIDTH = 512
DIRECTIONS = 64
CLIENTS = 8
K = 60
KEPT_S = 2.0  # seconds without a request after which a client opens another connection
SERVE = "import sys; from m2_encoder.cli import commands; sys.exit(commands.SERVE())"


def make_index(
    folder: Path, features: npt.NDArray[np.float32], dtype: str, *, graph: bool, made_by: IndexModel | None = None
) -> PictureIndex:
    """An index of features without pictures."""
    folder.mkdir()
    np.save(folder / "features-0.npy", features.astype(dtype))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "root": str(folder),
        "model": (made_by or IndexModel("none", None, None, "standard", ""))._asdict(),
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


class Client:
    """Asks one server; each thread on a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port, self.local = port, threading.local()

    def post(self, path: str, values: object) -> Any:
        """The answer to JSON."""
        idle = time.monotonic() - getattr(self.local, "used", -math.inf)
        if idle > KEPT_S:  # the server closes what is idle
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self.local.used = time.monotonic()
        self.local.connection.request("POST", path, json.dumps(values), {"Content-Type": "application/json"})
        answer = self.local.connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200, content
        return content


@contextlib.contextmanager
def served(folder: Path, index: Path) -> Iterator[Client]:
    """m2-serve with an index, in a process of its own."""
    command = [sys.executable, "-c", SERVE, f"index={index}", "port=0", "device=cpu"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            assert found, line
            yield Client(int(found[1]))
        finally:
            process.terminate()


def measure_server(report: Report, folder: Path, features: npt.NDArray[np.float32], calls: int) -> None:
    """Words over HTTP, from one client and from several at once."""
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    config = M2EncoderConfig.from_name("tiny", feature_dim=WIDTH, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    export_model(folder / "export", model=M2Encoder(config), tokenizer=tokenizer)
    made_by = open_search_model(folder / "export").made_by
    for dtype in ("float32", "float16"):
        index = make_index(folder / f"served-{dtype}", features, dtype, graph=False, made_by=made_by)
        words = [f"a {colour} thing, number {number}" for number in range(calls) for colour in ("red", "蓝色的")]
        with served(folder, index.path) as client:
            wanted = np.array(client.post("/api/embed", {"texts": words[:8]})["features"])
            best = np.argmax(np.asarray(index.features, dtype=np.float64) @ wanted.T, axis=0)
            for word, row in zip(words[:8], best, strict=True):
                found = client.post("/api/search", {"query": word, "count": K})["results"]
                assert len(found) == K
                assert found[0]["name"] == index.names[row], (word, found[0])

            def search(i: int, client: Client = client, words: list[str] = words) -> object:
                return client.post("/api/search", {"query": words[i], "count": K})

            for clients in (1, CLIENTS):
                median, slow, rate = time_calls(search, calls, clients)
                report.add(
                    f"{dtype}, all compared, m2-serve over HTTP", clients=clients, p50_ms=round(median, 2),
                    p99_ms=round(slow, 2), per_s=round(rate, 1),
                )  # fmt: skip


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
        if all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn", "python_multipart")):
            measure_server(report, Path(folder), features, calls)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
