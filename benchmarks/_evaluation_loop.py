"""The loops of a whole evaluation that `evaluation.py` compares: reading, decoding, encoding and ranking.

Both get one web dataset of photo-like JPEGs with five captions each, and one model, which CLIP_benchmark loads by the
registration of `evaluation.doors`, as its command does. All is done on one thread, so that CPU time is work, and not
waiting; CLIP_benchmark's workers, processes that send pictures to the first one, would come on top.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _photos import SHARDS
from _retrieval_peers import BATCH, KS, Recalls

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.evaluation.doors.clip_benchmark import load_for_clip_benchmark
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.measures.retrieval import measure_retrieval
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.evaluation.sets.reading import read_set
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

MODEL, SIDE, PATCH = "tiny", 224, 16  # small, with pictures of the usual size
CAPTIONS = 5


def export_random(folder: Path) -> Path:
    """A model with random weights, as a folder that both open."""
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    torch.manual_seed(0)
    model = M2Encoder(M2EncoderConfig.from_name(MODEL, image_size=SIDE, patch_size=PATCH)).eval()
    return export_model(folder / "model", model=model, tokenizer=tokenizer)


def write_web_dataset(folder: Path, photos: Path) -> Path:
    """CLIP_benchmark's layout of tars of `_photos`; captions are the words of a picture in orders of their own."""
    test = folder / "retrieval" / "test"
    test.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for shard in range(SHARDS):
        with tarfile.open(photos / f"{shard:06d}.tar") as source, tarfile.open(test / f"{shard}.tar", "w") as tar:
            for member in source:
                content = source.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".txt"):
                    words = content.decode().split()
                    rows = [
                        " ".join(rng.permutation(words)[: rng.integers(6, len(words) + 1)]) for _ in range(CAPTIONS)
                    ]
                    content = "\n".join(rows).encode()
                    member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (test / "nshards.txt").write_text(f"{SHARDS}\n")
    (test.parent / "dataset_type.txt").write_text("retrieval\n")
    return test.parent


def our_loop(model: Path, data: Path) -> Recalls:
    """What `m2-evaluate` does with a retrieval set, intervals included."""
    dataset = read_set(data, layout="clip_benchmark", language="en")
    with FeatureEncoder(open_model(model), batch_size=BATCH) as encoder:
        encoded = encoder.encode_set(dataset)
    found = measure_retrieval(encoded.images, encoded.texts["en"], dataset.texts["en"].pairs)
    return {each.metric: each.value for each in found.measurements}


def find_clip_benchmark(folder: Path | None) -> tuple[Any, Any] | None:
    """Its builder of datasets and its retrieval, from a checkout or installed; None without either."""
    if folder is not None:
        sys.path.insert(0, str(folder.absolute()))
    try:
        from clip_benchmark.datasets.builder import build_dataset
        from clip_benchmark.metrics import zeroshot_retrieval
    except ImportError as error:
        if folder is not None:
            raise SystemExit(f"--clip-benchmark {folder}: {error}") from error
        return None
    return build_dataset, zeroshot_retrieval


def clip_benchmark_loop(peer: tuple[Any, Any], model: Path, data: Path) -> Recalls:
    """What its command does with a retrieval set, in fp32."""
    build_dataset, retrieval = peer
    module, transform, tokenizer = load_for_clip_benchmark(str(model))
    dataset = build_dataset("wds/retrieval", str(data), transform, "test", task="zeroshot_retrieval")
    loader = torch.utils.data.DataLoader(dataset.batched(BATCH), batch_size=None, shuffle=False)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        found = retrieval.evaluate(module, loader, tokenizer, device="cpu", amp=False, recall_k_list=list(KS))
    ways = {"t2i": "image", "i2t": "text"}
    return {f"{way}_r@{k}": 100 * found[f"{name}_retrieval_recall@{k}"] for way, name in ways.items() for k in KS}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_cpu(loops: dict[str, Callable[[], Recalls]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of whole loops in turns, on one thread; every second round goes backwards."""
    seconds: dict[str, list[float]] = {label: [] for label in loops}
    with one_thread():
        for number in range(rounds):
            for label in list(loops) if number % 2 == 0 else list(reversed(loops)):
                before = time.process_time()
                loops[label]()
                seconds[label].append(time.process_time() - before)
    return seconds
