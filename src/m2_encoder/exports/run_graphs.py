"""Runs two ONNX graphs over samples, in a process that holds nothing else: started as a file, not imported.

    python run_graphs.py IMAGE.onnx TEXT.onnx INPUTS.npz OUTPUTS.npz THREADS

It imports neither torch nor this package, so that its peak memory is what the graphs take.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_BATCH = 8
_DTYPES = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}


def run(image_path: str, text_path: str, inputs: str, outputs: str, threads: str) -> None:
    """Writes features, (n, E) and (m, E), medians in ms and bytes."""
    # Opening takes more than what is left of it, so the larger one, with the token table, comes first.
    opened = {path: _open(path, int(threads)) for path in sorted((image_path, text_path), key=_size, reverse=True)}
    sessions = [opened[path] for path in (image_path, text_path)]
    with np.load(inputs) as given:
        pixels, ids, lengths = given["pixels"], given["ids"], given["lengths"]
    images, image_ms = _encode(sessions[0], [pixels[row : row + 1] for row in range(len(pixels))])
    texts, text_ms = _encode(sessions[1], [ids[row : row + 1, :length] for row, length in enumerate(lengths)])
    gap = 0.0
    for session, rows, alone in ((sessions[0], pixels[:_BATCH], images), (sessions[1], ids[:_BATCH], texts)):
        gap = max(gap, float(np.abs(_call(session, rows) - alone[: len(rows)]).max()))
    np.savez(
        outputs,
        images=images,
        texts=texts,
        image_ms=image_ms,
        text_ms=text_ms,
        batch_difference=gap,
        peak_bytes=_peak(),
    )


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _open(path: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _call(session: Any, values: Any) -> Any:
    (entry,) = session.get_inputs()
    return session.run(None, {entry.name: np.ascontiguousarray(values, _DTYPES[entry.type])})[0]


def _encode(session: Any, batches: list[Any]) -> tuple[Any, float]:
    _call(session, batches[0])
    features, times = [], []
    for batch in batches:
        started = time.perf_counter()
        features.append(_call(session, batch))
        times.append(time.perf_counter() - started)
    return np.concatenate(features), 1000 * float(np.median(times))


def _peak() -> int:
    """Of this program alone: what `resource` says begins with the memory of whoever started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    run(*sys.argv[1:])
