"""Encodes samples with transformers, in a process that holds nothing else: started as a file, not imported.

    python run_transformers.py FOLDER INPUTS.json OUTPUTS.npz THREADS

It imports nothing of this package, so that the folder alone must do. Inputs are `texts`, `pictures`, which are paths of
files that any library reads alike, and `files`, the same as they were before.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor
from transformers.image_utils import load_image


def run(folder: str, inputs: str, outputs: str, threads: str) -> None:
    """Writes features, (n, E), (n, E) and (m, E), medians in ms, and whether two ways of doing the same differ."""
    torch.set_num_threads(int(threads))
    given = json.loads(Path(inputs).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        pictures = [_read_picture(processor, path) for path in given["pictures"]]
        images, image_ms = _encode(model.get_image_features, pictures)
        files = images.copy()
        for row, path in enumerate(given["files"]):
            pixels = _read_picture(processor, path)
            if not pixels["pixel_values"].equal(pictures[row]["pixel_values"]):
                files[row] = model.get_image_features(**pixels).numpy()
        texts, text_ms = _encode(model.get_text_features, [_read_texts(processor, [text]) for text in given["texts"]])
        batch = model.get_text_features(**_read_texts(processor, given["texts"]))
    peak_bytes = _peak()  # of one model
    again = AutoModel.from_pretrained(folder, trust_remote_code=True).state_dict()
    np.savez(
        outputs,
        images=images,
        files=files,
        texts=texts,
        image_ms=image_ms,
        text_ms=text_ms,
        batch_difference=np.abs(batch.numpy() - texts).max(),
        loads_differ=any(not value.equal(again[name]) for name, value in model.state_dict().items()),
        peak_bytes=peak_bytes,
    )


def _read_picture(processor: Any, path: str) -> Any:
    return processor(images=load_image(path), return_tensors="pt")


def _read_texts(processor: Any, texts: list[str]) -> Any:
    return processor(text=texts, padding=True, truncation=True, return_tensors="pt")


def _encode(encode: Any, rows: list[Any]) -> tuple[Any, float]:
    encode(**rows[0])
    features, times = [], []
    for row in rows:
        started = time.perf_counter()
        features.append(encode(**row).float().numpy())
        times.append(time.perf_counter() - started)
    return np.concatenate(features), 1000 * float(np.median(times))


def _peak() -> int:
    """Memory of this program alone, where the system says it; else with that of whoever started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    run(*sys.argv[1:])
