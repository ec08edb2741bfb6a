"""The part of `contrastive.py` that needs several processes: four gloo ranks, times and what they send."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _common import Report, Timing, speedup
from torch import Tensor
from torch.nn import functional

from m2_encoder.objectives import image_text_contrastive
from m2_encoder.planning.communication import contrastive_bytes

WORLD = 4
ROWS = 512
WIDTH = 768
LOG_SCALE = 2.6593
PEER = "open_clip, local loss"


def load_clip_loss() -> Any:
    """open_clip's ClipLoss, from its own file: importing the package would cost every process seconds."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None, "checked at the start"
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


class Sent:
    """Counts what this rank hands to torch's collectives; a ring sends each part on g - 1 times.

    Attributes:
        bytes: sent by this rank.
        collectives: calls.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.collectives = 0

    @contextmanager
    def counting(self) -> Iterator[Sent]:
        """Watch every collective that moves tensors."""
        with ExitStack() as stack:
            known = {name: part for name, part in _MOVED.items() if hasattr(dist, name)}  # torch renames some
            for name, part in known.items():
                original = getattr(dist, name)

                def counted(*args: Any, _original: Any = original, _part: Any = part, **kwargs: Any) -> Any:
                    others = dist.get_world_size(kwargs.get("group")) - 1
                    self.bytes += others * _part(args, kwargs)
                    self.collectives += 1
                    return _original(*args, **kwargs)

                stack.enter_context(mock.patch.object(dist, name, counted))
            yield self


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Bytes of the part that goes to each other rank, by collective.
_MOVED: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], int]] = {
    "all_gather_into_tensor": lambda args, kwargs: _size(args[1]),
    "all_gather_single": lambda args, kwargs: _size(args[1]),
    "all_gather": lambda args, kwargs: _size(args[1]),
    "reduce_scatter_tensor": lambda args, kwargs: _size(args[0]),
    "reduce_scatter_single": lambda args, kwargs: _size(args[0]),
    "reduce_scatter": lambda args, kwargs: _size(args[0]),
    "all_reduce": lambda args, kwargs: 2 * _size(args[0]) // dist.get_world_size(kwargs.get("group")),
    "all_to_all": lambda args, kwargs: _size(args[1][0]),
    "all_to_all_single": lambda args, kwargs: _size(args[1]) // dist.get_world_size(kwargs.get("group")),
    "broadcast": lambda args, kwargs: _size(args[0]),
}


def measure_ranks(report: Report, *, quick: bool) -> None:
    """Four ranks on this machine's cores, one thread each: ours in groups beside open_clip's local loss."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        result = Path(folder) / "result.json"
        torch.multiprocessing.spawn(_rank, (port, 3 if quick else 25, str(result)), nprocs=WORLD)
        measured = json.loads(result.read_text())
    timings = {name: Timing(tuple(values)) for name, values in measured["seconds"].items()}
    matches: bool = True
    for name, timing in timings.items():
        sent, collectives, in_backward = measured["sent"][name]
        planned = _planned(name)
        counted = {"sent_mb": round(sent / 1e6, 3), "collectives": collectives, "in_backward": in_backward}
        if planned is None:
            counted = dict.fromkeys(counted, "not seen")
        else:
            matches = matches and (sent, collectives, in_backward) == (*planned, 0)
        report.add(
            f"{WORLD} ranks, {ROWS} rows each",
            candidate=name,
            **timing.row(),
            time_over_open_clip=round(1 / speedup(timings[PEER], timing), 3),
            **counted,
        )
    report.figures["comm_matches_formula"] = matches and measured["grid"]
    report.figures["comm_settings_checked"] = measured["grid_size"] + len(timings) - 1
    for size in (4, 2, 1):
        report.figures[f"time_ratio_4_ranks_g{size}"] = speedup(timings[PEER], timings[f"ours, g = {size}"])


def _planned(name: str) -> tuple[int, int] | None:
    if name == PEER:
        return None  # its backward sends below the functions that the wrapper watches
    size = int(name.rpartition(" ")[2])
    cost = contrastive_bytes(
        "local_form", world_size=WORLD, group_size=size, rows=ROWS, feature_dim=WIDTH, bytes_per_element=4
    )
    return cost.bytes_sent, cost.collectives


def _rank(rank: int, port: int, rounds: int, result: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # open_clip calls functions by names that torch gave up
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo")
    groups: dict[int, dist.ProcessGroup | None] = {4: dist.group.WORLD, 1: None}
    for start in (0, 2):
        group = dist.new_group([start, start + 1])
        if start <= rank < start + 2:
            groups[2] = group
    clip_loss = load_clip_loss()(local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(rank)
    features = [functional.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=1) for _ in range(2)]
    losses: dict[str, Callable[..., Tensor]] = {PEER: lambda x, y, s: clip_loss(x, y, s.exp())}
    for size, group in sorted(groups.items(), reverse=True):
        losses[f"ours, g = {size}"] = lambda x, y, s, group=group: image_text_contrastive(
            x, y, s, group=group, equal_rows=True
        )
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for i in range(-1, rounds):
        for name in list(losses) if i % 2 == 0 else reversed(list(losses)):
            dist.barrier()
            start = time.perf_counter()
            _forward(losses[name], features).backward()
            dist.barrier()  # a step ends when the last rank ends
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    sent = {name: _count(loss, features) for name, loss in losses.items()}
    grid, grid_size = _check_grid(groups)
    if rank == 0:
        Path(result).write_text(json.dumps({"seconds": seconds, "sent": sent, "grid": grid, "grid_size": grid_size}))
    dist.barrier()
    dist.destroy_process_group()


def _forward(loss: Callable[..., Tensor], features: list[Tensor]) -> Tensor:
    leaves = [side.detach().requires_grad_() for side in features]
    return loss(*leaves, torch.tensor(LOG_SCALE, requires_grad=True))


def _count(loss: Callable[..., Tensor], features: list[Tensor]) -> tuple[int, int, int]:
    """Bytes and collectives of a step, and the collectives of its backward."""
    with Sent().counting() as sent:
        value = _forward(loss, features)
        forward = sent.collectives
        value.backward()
    return sent.bytes, sent.collectives, sent.collectives - forward


def _check_grid(groups: dict[int, dist.ProcessGroup | None]) -> tuple[bool, int]:
    """Counts against the formula for every g, and several k, B, E, dtypes and numbers of heads."""
    checked, matches = 0, True
    for size, group in groups.items():
        for micro_batches, rows, width, dtype, heads in (
            (1, 3, 8, torch.float32, 1),
            (2, 5, 16, torch.bfloat16, 1),
            (4, 7, 24, torch.float32, 2),
            (4, 16, 768, torch.float16, 2),
        ):
            cost = contrastive_bytes(
                "local_form",
                world_size=WORLD,
                group_size=size,
                rows=rows,
                micro_batches=micro_batches,
                feature_dim=width,
                bytes_per_element=dtype.itemsize,
                heads=heads,
            )
            side = functional.normalize(torch.randn(micro_batches * rows, width), dim=1).to(dtype)
            counted = _count(
                lambda x, y, s, h=heads, g=group: image_text_contrastive(
                    [x] * h, [y] * h, [s] * h, group=g, equal_rows=True
                ),
                [side, side],
            )
            matches = matches and counted == (cost.bytes_sent, cost.collectives, 0)
            checked += 1
    return matches, checked
