"""Encoding with the 0.4B model, and loading it.

Images and texts, batch 16, against a plain implementation of the same formulas (plain_encoder.py: explicit softmax
attention, texts padded to 52 tokens) in one interleaved run on the same random weights. Captions have 6 to 24
tokens, evenly spread, 15 on average, as short Chinese and English captions do. Loading is measured in fresh
processes: peak memory above what the imports take, over the size of the file. On a GPU, also the throughput of
images in bf16, compiled, and its share of the matrix multiplication peak measured there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import Report, interleave, parse_arguments, speedup
from plain_encoder import PlainEncoder
from torch.utils.flop_counter import FlopCounterMode

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.checkpoints.io import save_official, save_safetensors
from m2_encoder.types import TextTokens

MODEL = "m2-encoder-0.4b"
BATCH = 16
SHORTEST, LONGEST = 6, 24
# Both sides compute the same features; what differs is the order of fp32 sums.
AGREEMENT = 1e-4

_LOAD = """
import json, pathlib, re, sys, time
import torch
from m2_encoder import load

def memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", status).group(1))

torch.set_num_threads(int(sys.argv[2]))
baseline = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
start = time.perf_counter()
loaded = load("m2-encoder-0.4b", weights=sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"baseline": baseline, "peak": memory("VmHWM"), "seconds": seconds}))
"""


def build_inputs(config: M2EncoderConfig) -> tuple[torch.Tensor, TextTokens, TextTokens]:
    """Images, captions as our tokenizer pads them, and the same captions padded to the context length."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, config.image_size, config.image_size, generator=generator)
    lengths = torch.linspace(SHORTEST, LONGEST, BATCH).round().long()[torch.randperm(BATCH, generator=generator)]
    ids = torch.randint(0, config.vocab_size, (BATCH, config.context_length), generator=generator)
    mask = torch.arange(config.context_length) < lengths[:, None]
    return images, TextTokens(ids[:, :LONGEST], mask[:, :LONGEST]), TextTokens(ids, mask)


@torch.inference_mode()
def measure_encoding(report: Report, model: M2Encoder, *, rounds: int) -> None:
    """Time both modalities; refuse to report if the two sides disagree."""
    plain = PlainEncoder(to_official_state(model.state_dict()), num_heads=model.config.num_heads)
    images, text, padded = build_inputs(model.config)
    pairs: dict[str, tuple[Any, Any]] = {
        "text": (lambda: model.encode_text(text), lambda: plain.text(*padded).cls_vlffn_feats),
        "image": (lambda: model.encode_image(images), lambda: plain.image(images).cls_vlffn_feats),
    }
    for modality, (ours, peer) in pairs.items():
        difference = (ours() - peer()).abs().max().item()
        if not difference < AGREEMENT:
            raise SystemExit(f"{modality} features differ by {difference:.1e}: the comparison means nothing")
        # Texts are several times cheaper: more rounds cost no more time.
        timings = interleave({"ours": ours, "plain": peer}, rounds=rounds * (3 if modality == "text" else 1))
        for label, timing in timings.items():
            per_item = 1e3 * timing.median / BATCH
            report.add(f"{modality}, batch {BATCH}, {label}", **timing.row(), ms_per_item=round(per_item, 2))
        report.figures[f"{modality}_speedup"] = speedup(timings["plain"], timings["ours"])


def measure_loading(report: Report, model: M2Encoder, *, threads: int, everything: bool) -> None:
    """Peak memory and time of loading, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"official checkpoint, fp32": Path(folder) / "official.ckpt"}
        save_official(model, files["official checkpoint, fp32"])
        if everything:
            files["safetensors, fp32"] = Path(folder) / "ours.safetensors"
            save_safetensors(model, files["safetensors, fp32"])
            files["training checkpoint with optimizer, fp32"] = Path(folder) / "last.ckpt"
            _save_training_checkpoint(model, files["training checkpoint with optimizer, fp32"])
        ratios = {}
        for label, path in files.items():
            result = _load_in_fresh_process(path, threads)
            size = path.stat().st_size
            ratios[label] = (result["peak"] - result["baseline"]) / size
            report.add(
                f"load {label}",
                file_gb=round(size / 1e9, 3),
                peak_above_imports_gb=round((result["peak"] - result["baseline"]) / 1e9, 3),
                peak_over_file=round(ratios[label], 3),
                seconds=round(result["seconds"], 2),
            )
            path.unlink()
    report.figures["load_peak_ratio"] = ratios["official checkpoint, fp32"]


def _save_training_checkpoint(model: M2Encoder, path: Path) -> None:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    moments = {i: {"exp_avg": p.detach(), "exp_avg_sq": p.detach() + 0} for i, p in enumerate(model.parameters())}
    for moment in moments.values():
        moment["exp_avg"] = moment["exp_avg"].clone()  # or torch would store one copy for both
    torch.save({"state_dict": state, "optimizer_states": [{"state": moments}]}, path)


def _load_in_fresh_process(path: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-c", _LOAD, str(path), str(threads)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


# -------------------------------------------------------------------------------------------------------------- GPU


@torch.inference_mode()
def measure_gpu(report: Report, model: M2Encoder, *, device: str, batch: int, rounds: int, side: int) -> None:
    """Throughput of images in bf16, compiled, beside the matrix multiplication peak of the same device."""
    model = model.to(device=device, dtype=torch.bfloat16)
    size = model.config.image_size
    images = torch.rand(batch, 3, size, size, device=device, dtype=torch.bfloat16)
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(model.encode_image)

    def synchronised(call: Any) -> Any:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    timings = interleave(
        {
            "compiled": synchronised(lambda: compiled(images)),
            "eager": synchronised(lambda: model.encode_image(images)),
            "matmul": synchronised(lambda: square @ square),
        },
        rounds=rounds,
        warmup=5,
    )
    with FlopCounterMode(display=False) as counter:
        model.encode_image(images)
    peak = 2 * side**3 / min(timings["matmul"].seconds)
    report.add(f"matmul {side}, bf16, {device}", **timings["matmul"].row(), tflops=round(peak / 1e12, 1))
    for label in ("compiled", "eager"):
        timing = timings[label]
        reached = counter.get_total_flops() / timing.median
        report.add(
            f"image, batch {batch}, bf16, {label}, {device}",
            **timing.row(),
            images_per_s=round(batch / timing.median, 1),
            tflops=round(reached / 1e12, 1),
            share_of_peak=round(reached / peak, 3),
        )
        report.figures[f"gpu_images_per_s_{label}"] = batch / timing.median
        report.figures[f"gpu_share_of_matmul_peak_{label}"] = reached / peak


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = Report(f"{MODEL}: encoding and loading, {arguments.threads} threads", distributions=("safetensors",))
    torch.manual_seed(0)
    start = time.perf_counter()
    model = M2Encoder(M2EncoderConfig.from_name(MODEL)).eval()
    report.add("build with random weights", seconds=round(time.perf_counter() - start, 2))
    measure_encoding(report, model, rounds=2 if arguments.quick else 15)
    measure_loading(report, model, threads=arguments.threads, everything=not arguments.quick)
    if torch.cuda.is_available():
        measure_gpu(report, model, device="cuda", batch=256, rounds=10 if arguments.quick else 50, side=8192)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
