"""ONNX graphs of the 0.4B model on ONNX Runtime, beside torch.

Both encode the same picture and the same text of 12 tokens, batch 1, in one interleaved run on random weights; before
that, their features are compared over the 64 texts and 32 pictures that every export is tried on. Peak memory is that
of a process of its own that opens both graphs and encodes all of these, and holds neither torch nor this package. It
needs the extra export.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Report, interleave, parse_arguments, speedup

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.exports.base import Features, compare
from m2_encoder.exports.graphs import Graphs, GraphSettings, run_graphs, share_graphs
from m2_encoder.exports.samples import make_pictures

MODEL = "m2-encoder-0.4b"
END_ID = 50_000  # of the official tokenizer
TOKENS = 12
NUM_TEXTS = 64


def make_texts(config: M2EncoderConfig) -> list[list[int]]:
    """Ids of texts of 2 tokens to the longest, short ones more often."""
    generator = torch.Generator().manual_seed(1)
    lengths = (2 + (config.context_length - 2) * torch.rand(NUM_TEXTS, generator=generator) ** 2).round().long()
    lengths[:2] = torch.tensor([TOKENS, config.context_length])
    rows = [torch.randint(0, END_ID, (int(length) - 1,), generator=generator).tolist() for length in lengths]
    return [[*row, END_ID] for row in rows]


def open_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning while it is torch's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def measure(report: Report, model: M2Encoder, graphs: Graphs, *, rounds: int, threads: int) -> None:
    """Agreement and memory first, then the times."""
    transform = EvalTransform(model.config.image_size)
    pixels = torch.stack([transform(picture.content) for picture in make_pictures()])
    texts = make_texts(model.config)
    run = run_graphs(graphs, pixels=pixels, rows=texts)
    images = torch.cat([model.encode_image(batch) for batch in pixels.split(8)])
    ours = Features(images, torch.cat([model.encode_text(torch.tensor([row])) for row in texts]))
    difference, cosine = compare(ours, run.features)
    report.add(
        "both graphs in one process",
        peak_gb=round(run.peak_bytes / 1e9, 3),
        largest_difference=f"{difference:.1e}",
        smallest_cosine=f"{cosine:.7f}",
    )
    report.figures |= {"onnx_peak_gb_0_4b": run.peak_bytes / 1e9, "cos_min": cosine}

    picture, ids = pixels[:1], torch.tensor(texts[:1])
    inputs = {
        "image": (graphs.image, {"pixel_values": picture.numpy()}, partial(model.encode_image, picture)),
        "text": (graphs.text, {"input_ids": ids.numpy().astype(np.int64)}, partial(model.encode_text, ids)),
    }
    for modality, (path, values, by_torch) in inputs.items():
        session = open_session(path, threads)
        candidates = {"onnx": partial(session.run, None, values), "torch": by_torch}
        # Texts are several times cheaper: more rounds cost no more time.
        timings = interleave(candidates, rounds=rounds * (3 if modality == "text" else 1), warmup=2)
        for label, timing in timings.items():
            report.add(f"{modality}, batch 1, {label}", **timing.row())
        report.figures[f"onnx_speedup_{modality}"] = speedup(timings["torch"], timings["onnx"])
        del session


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = Report(f"{MODEL}: ONNX Runtime and torch, {arguments.threads} threads", distributions=("onnxruntime",))
    torch.manual_seed(0)
    model = M2Encoder(M2EncoderConfig.from_name(MODEL)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        settings = GraphSettings(torch.float32, model.config.context_length, False)
        graphs = share_graphs(Path(folder), model, settings, end_id=END_ID, metadata={})
        seconds = time.perf_counter() - start
        sizes = {f"{name}_mb": round(path.stat().st_size / 1e6) for name, path in graphs._asdict().items()}
        report.add("export", seconds=round(seconds, 1), **sizes)
        measure(report, model, graphs, rounds=10 if arguments.quick else 40, threads=arguments.threads)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
