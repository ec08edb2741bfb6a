"""The fastest settings that fit into memory, and the step time over world sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from m2_encoder.distributed.topology import divisors
from m2_encoder.errors import UserError
from m2_encoder.planning.cost import ModelCost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.setting import STRATEGIES, Setting, group_sizes_of
from m2_encoder.planning.step import Prediction, predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The planning problem: given values, and None for what the search may choose."""

    world_size: int  # W
    global_rows: int  # rows of an optimizer step, W · k · B
    contrasted_rows: int  # rows M that a row is contrasted with, at least
    memory_gb: float  # what a rank may use, 10^9 bytes
    group_size: int | None = None  # g
    micro_batches: int | None = None  # k
    strategy: str | None = None  # one of `STRATEGIES`
    recompute: bool | None = None  # encode micro-batches again instead of keeping their activations
    activation_checkpointing: bool | None = None  # compute layers again
    feature_bytes: int = 4  # of a feature element on the wire
    min_rows: int = 1  # smallest B to consider while k is free, as far as a rank has so many rows


def enumerate_settings(request: Request, hardware: Hardware) -> Iterator[Setting]:
    """All settings of the local form that match a request, whether they fit into memory or not.

    Raises:
        UserError: if the numbers do not divide each other; the message says which would.
    """
    local_rows = _local_rows(request)
    sizes = group_sizes_of(request.world_size, hardware)
    if request.group_size is not None and request.group_size not in sizes:
        raise UserError(
            f"group_size={request.group_size}: must divide the {request.world_size} ranks and be node-aligned; "
            f"use one of {', '.join(map(str, sizes))}"
        )
    ks = divisors(local_rows)
    if request.micro_batches is not None and request.micro_batches not in ks:
        raise UserError(
            f"micro_batches={request.micro_batches}: must divide the {local_rows} rows of a rank; "
            f"use one of {', '.join(map(str, ks))}"
        )
    large = [k for k in ks if local_rows // k >= min(request.min_rows, local_rows)]
    enough = [size for size in sizes if size * local_rows >= request.contrasted_rows]
    if request.group_size is None and not enough:
        raise UserError(
            f"group_batch_size={request.contrasted_rows}: all ranks together have {request.global_rows} rows; "
            f"use group_batch_size={request.global_rows} or a larger global_batch_size"
        )
    for group_size in enough if request.group_size is None else [request.group_size]:
        for micro_batches in large if request.micro_batches is None else [request.micro_batches]:
            for strategy in STRATEGIES if request.strategy is None else [request.strategy]:
                for recompute in _either(request.recompute, matters=micro_batches > 1):
                    for checkpointing in _either(request.activation_checkpointing):
                        yield Setting(
                            world_size=request.world_size,
                            group_size=group_size,
                            rows=local_rows // micro_batches,
                            micro_batches=micro_batches,
                            strategy=strategy,
                            recompute=recompute,
                            activation_checkpointing=checkpointing,
                            feature_bytes=request.feature_bytes,
                        )


def find_best(cost: ModelCost, hardware: Hardware, request: Request) -> list[Prediction]:
    """For every group size, the fastest setting that fits; the fastest first.

    Raises:
        UserError: if none fits; the message says how much the smallest needs.
    """
    predictions = _predict_all(cost, hardware, request)
    fitting = [item for item in predictions if item.memory.total <= request.memory_gb * 1e9]
    if not fitting:
        least = min(predictions, key=lambda item: item.memory.total)
        raise UserError(
            f"memory_gb={request.memory_gb:g}: no setting fits; the smallest needs {least.memory.total / 1e9:.1f} GB "
            f"({describe(least.setting)}); use more ranks, fewer rows, or larger devices"
        )
    best: dict[int, Prediction] = {}
    for item in sorted(fitting, key=_preference):
        best.setdefault(item.setting.group_size, item)
    return sorted(best.values(), key=_preference)


def find_baselines(cost: ModelCost, hardware: Hardware, request: Request) -> list[Prediction]:
    """The same rows with a loss over all ranks: full logits, and a good local loss.

    Of each the fastest setting that fits is taken, also with micro-batches that have a loss of their own, if those
    contrast enough rows. Where none fits, the one with the least memory is taken.
    """
    local_rows = _local_rows(request)
    ks = [
        k
        for k in divisors(local_rows)
        if k == 1
        or (local_rows // k >= request.min_rows and request.world_size * local_rows // k >= request.contrasted_rows)
    ]
    found = []
    for method in ("local_loss", "full_logits"):
        tried = [
            predict(
                cost,
                hardware,
                Setting(
                    world_size=request.world_size,
                    group_size=request.world_size,
                    rows=local_rows // k,
                    micro_batches=k,
                    method=method,
                    strategy=strategy,
                    activation_checkpointing=checkpointing,
                    feature_bytes=request.feature_bytes,
                ),
            )
            for k in ks
            for strategy in (STRATEGIES if request.strategy is None else [request.strategy])
            for checkpointing in _either(request.activation_checkpointing)
        ]
        found.append(_choose(tried, request))
    return found


class ScalingPoint(NamedTuple):
    """Predictions of one world size; those that do not fit have a memory above the limit."""

    world_size: int  # W
    best: Prediction  # grouped, with the fastest group that contrasts enough rows
    fixed: Prediction | None  # grouped, with one group size for all worlds; None where it does not divide the world
    full: Prediction  # the local form over all ranks
    local_loss: Prediction  # the good baseline
    full_logits: Prediction  # the naive baseline


def scale_worlds(
    cost: ModelCost,
    hardware: Hardware,
    request: Request,
    planned: Setting,
    *,
    world_sizes: Sequence[int],
    fixed_group_size: int,
) -> list[ScalingPoint]:
    """Predictions for the same rows per rank on other numbers of ranks; free values are chosen anew for each.

    A world too small for the wanted rows contrasts all it has. `fixed_group_size` is g of the points' `fixed`.
    """
    points = []
    for world in world_sizes:
        rows = world * planned.local_rows
        scaled = dataclasses.replace(
            request,
            world_size=world,
            global_rows=rows,
            contrasted_rows=min(request.contrasted_rows, rows),
            group_size=None,
        )
        grouped = _predict_all(cost, hardware, scaled)
        sizes = group_sizes_of(world, hardware)
        fixed, full = (
            _predict_all(cost, hardware, dataclasses.replace(scaled, group_size=size)) if size in sizes else []
            for size in (fixed_group_size, world)
        )
        local_loss, full_logits = find_baselines(cost, hardware, scaled)
        points.append(
            ScalingPoint(
                world_size=world,
                best=_choose(grouped, scaled),
                fixed=_choose(fixed, scaled) if fixed else None,
                full=_choose(full, scaled),
                local_loss=local_loss,
                full_logits=full_logits,
            )
        )
    return points


def describe(setting: Setting) -> str:
    """A setting in a few words."""
    if setting.method != "local_form":
        words = [setting.method, setting.strategy, f"rows {setting.rows}"]
    else:
        words = [setting.strategy, f"g {setting.group_size}", f"k {setting.micro_batches}", f"B {setting.rows}"]
    words += ["recompute"] * setting.encodes_again
    words += ["activation checkpointing"] * setting.activation_checkpointing
    return ", ".join(words)


def _predict_all(cost: ModelCost, hardware: Hardware, request: Request) -> list[Prediction]:
    return [predict(cost, hardware, setting) for setting in enumerate_settings(request, hardware)]


def _choose(predictions: Sequence[Prediction], request: Request) -> Prediction:
    """The fastest that fits, or the smallest if none does."""
    fitting = [item for item in predictions if item.memory.total <= request.memory_gb * 1e9]
    return min(fitting, key=_preference) if fitting else min(predictions, key=lambda item: item.memory.total)


def _local_rows(request: Request) -> int:
    if request.global_rows % request.world_size or request.global_rows < request.world_size:
        below = max(1, request.global_rows // request.world_size) * request.world_size
        raise UserError(
            f"global_batch_size={request.global_rows}: must be a multiple of the {request.world_size} ranks; "
            f"use {below} or {below + request.world_size}"
        )
    return request.global_rows // request.world_size


def _preference(item: Prediction) -> tuple[float, int, float]:
    """The fastest first; among equals the one with fewer micro-batches, then with less memory."""
    return (-round(item.pairs_per_s, 3), item.setting.micro_batches, item.memory.total)


def _either(value: bool | None, *, matters: bool = True) -> Iterable[bool]:
    if value is not None:
        return (value,)
    return (False, True) if matters else (False,)
