"""What a model costs on this machine: memory, and milliseconds per picture and text.

Letters: N rows of a batch.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from m2_encoder.data.images.transforms import ImageSource
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.models.base import EvaluatedModel

_WARM_UP: Final = 2  # calls that are not counted: the first ones allocate, choose kernels and read weights
_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")


def measure_cost(
    model: EvaluatedModel,
    pictures: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    repeats: int = 7,
    held: int = 0,
) -> dict[str, float]:
    """Times and memory of a model, on its device; pictures and texts are repeated to fill a batch.

    Args:
        model: files of features cost nothing: there is no number for them.
        pictures: at least one.
        texts: at least one, unless the model has no text tower.
        batch_size: N.
        repeats: timed calls, after two that are not counted.
        held: bytes that do not count as memory of the model, such as `held_bytes()` from before it was opened.

    Returns:
        `image_ms@1`, `image_ms@N`, `text_ms@1`, `text_ms@N`: medians over calls of the time of a batch of 1 and N, per
        picture or text, of the towers alone; `preprocess_ms` of one picture, decoding included; `peak_memory_mb`, 2**20
        bytes: on CUDA what tensors took at most, with the weights; else the most that this process held meanwhile,
        beyond `held`.

    Raises:
        UserError: without pictures or texts.
    """
    if model.model is None:
        return {}
    if not pictures or not (texts or model.no_texts):
        raise UserError("the cost of a model is measured on pictures and texts; give at least one of each")
    towers: Any = model.model
    costs = {}
    with evaluation_mode(towers) as device:
        _reset_peak(device)
        costs["preprocess_ms"] = _median_ms(lambda: model.preprocess(pictures[0]), torch.device("cpu"), repeats)
        pixels = torch.stack([model.preprocess(pictures[row % len(pictures)]) for row in range(batch_size)])
        for size in dict.fromkeys((1, batch_size)):
            batch = pixels[:size].to(device)
            taken = _median_ms(lambda batch=batch: towers.encode_image(batch), device, repeats)  # type: ignore[misc]
            costs[f"image_ms@{size}"] = taken / size
        for size in () if model.no_texts else dict.fromkeys((1, batch_size)):
            made = model.tokenizer([texts[row % len(texts)] for row in range(size)])
            tokens = type(made)(made.ids.to(device), made.mask.to(device))
            taken = _median_ms(lambda tokens=tokens: towers.encode_text(tokens), device, repeats)  # type: ignore[misc]
            costs[f"text_ms@{size}"] = taken / size
        peak = _peak_bytes(device)
        costs["peak_memory_mb"] = (peak if device.type == "cuda" else max(0, peak - held)) / 2**20
    return costs


def held_bytes() -> int:
    """What this process holds now, after what it no longer needs went back to the system; 0 where that is unknown."""
    gc.collect()
    if not _STATUS.exists():
        return 0
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def _median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    seconds = []
    for number in range(_WARM_UP + repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # the peak starts anew: it is this model's, not that of one before it


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _CLEAR.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
