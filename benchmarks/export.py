"""What exports give and cost: 0.4B graphs on ONNX Runtime beside torch, and the parity of all formats.

Figures: torch and ONNX Runtime encode the same picture and the same text of 12 tokens, batch 1, in one interleaved run
on random weights; before that, their features are compared over 64 texts and the 32 pictures that every export is tried
on. Peak memory is that of a process of its own that opens both graphs and encodes all of these, and holds neither torch
nor this package.

Without --quick also the numbers that m2-export prints, for each format and option: of a trained model, --model, and of
0.4B with random weights and the built-in tokenizer. Formats are written one after the other and removed: 4 GB of disk.

    python benchmarks/export.py --model outputs/emoji/export --json benchmarks/results/export-epyc-2c.json

It needs the extra export, and for the format web what `python -m m2_encoder.exports.web_runtime` fetches.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Report, interleave, parse_arguments, speedup

from m2_encoder import M2Encoder, M2EncoderConfig, UserError, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.exports.base import ExportFormat, ExportSource, Features, compare
from m2_encoder.exports.graphs import Graphs, GraphSettings, run_graphs, share_graphs
from m2_encoder.exports.immich import Immich
from m2_encoder.exports.native import Native
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.parity import FormatResult
from m2_encoder.exports.samples import make_pictures
from m2_encoder.exports.transformers_format import Transformers
from m2_encoder.exports.web_format import Web
from m2_encoder.hub import LoadedModel
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

MODEL = "m2-encoder-0.4b"
END_ID = 50_000  # of the official tokenizer
TOKENS = 12
NUM_TEXTS = 64


FORMATS: Mapping[str, ExportFormat] = {
    "native": Native(),
    "onnx": Onnx(),
    "onnx, dtype=float16": Onnx(dtype="float16"),
    "onnx, token_table=int8": Onnx(token_table="int8"),
    "onnx, dtype=int8": Onnx(dtype="int8"),
    "transformers": Transformers(),
    "immich": Immich(),
    "web": Web(),
}


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


def measure_formats(report: Report, label: str, source: ExportSource) -> None:
    """A row for each format: what m2-export would print of it, and whether it would be written."""
    image_ms, text_ms = source.milliseconds()
    empty = dict.fromkeys(("largest_difference", "smallest_cosine", "mb"), "")
    no_recall = dict.fromkeys(("recall_fp32", "recall"), "")
    times = {"image_ms": round(image_ms, 2), "text_ms": round(text_ms, 2), "peak_mb": ""}
    report.add(f"{label}, torch", **empty, **times, **no_recall, written="")
    with tempfile.TemporaryDirectory() as scratch:
        for name, each in FORMATS.items():
            folder = Path(scratch) / "staged"
            if problems := [*each.problems(source.model.config)]:
                times = dict.fromkeys(("image_ms", "text_ms", "peak_mb"), "")
                report.add(f"{label}, {name}", **empty, **times, **no_recall, written=f"no: {problems[0].rule}")
                continue
            each.write(folder, source)
            result = FormatResult(name, each.bound, each.measure(folder, source), {}, "")
            found, recall = result.measured, result.measured.recall
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
            report.add(
                f"{label}, {name}",
                largest_difference=f"{found.largest_difference:.1e}",
                smallest_cosine=f"{found.smallest_cosine:.7f}",
                mb=round(size / 1e6, 1),
                image_ms="" if found.image_ms is None else round(found.image_ms, 2),
                text_ms="" if found.text_ms is None else round(found.text_ms, 2),
                peak_mb="" if found.peak_bytes is None else round(found.peak_bytes / 1e6),
                recall_fp32="" if recall is None else round(recall.ours_mean, 2),
                recall="" if recall is None else round(recall.theirs_mean, 2),
                written=f"no: {result.rule}" if result.rule else "yes",
            )


def trained_source(folder: Path) -> ExportSource:
    """The model of a folder that m2-train or m2-export wrote."""
    loaded = load(folder)
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    pictures = loaded.preprocess.pictures
    write = partial(export_model, model=loaded.model, tokenizer=loaded.tokenizer, pictures=pictures)
    return ExportSource(loaded, "", write)


def random_source(model: M2Encoder) -> ExportSource:
    """A model with the built-in tokenizer, whose pieces are fewer than its token table has rows."""
    config = model.config
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=config.context_length)
    write = partial(export_model, model=model, tokenizer=tokenizer)
    return ExportSource(LoadedModel(model, EvalTransform(config.image_size), tokenizer), "", write)


def check_model(arguments: Any) -> ExportSource | None:
    """The trained model; None if it is not wanted. Ends the program if it cannot be loaded."""
    if arguments.quick:
        return None
    try:
        return trained_source(arguments.model)
    except UserError as error:
        raise SystemExit(f"--model: {error}; train it with make train, give another, or use --quick") from error


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        configure=lambda parser: parser.add_argument(
            "--model", type=Path, default=Path("outputs/emoji/export"), metavar="FOLDER",
            help="exported folder of a trained model, for the parity of all formats (default: %(default)s)",
        ),
    )  # fmt: skip
    trained = check_model(arguments)
    distributions = ("onnx", "onnxruntime", "onnxscript", "tokenizers", "transformers")
    report = Report(f"exports: ONNX Runtime and torch, {arguments.threads} threads", distributions=distributions)
    torch.manual_seed(0)
    model = M2Encoder(M2EncoderConfig.from_name(MODEL)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        settings = GraphSettings(torch.float32, model.config.context_length)
        graphs = share_graphs(Path(folder), model, settings, end_id=END_ID, metadata={})
        seconds = time.perf_counter() - start
        sizes = {f"{name}_mb": round(path.stat().st_size / 1e6) for name, path in graphs._asdict().items()}
        report.add("export", seconds=round(seconds, 1), **sizes)
        measure(report, model, graphs, rounds=10 if arguments.quick else 40, threads=arguments.threads)
    if trained is not None:
        measure_formats(report, trained.model.config.name, trained)
        measure_formats(report, f"{MODEL}, random", random_source(model))
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
