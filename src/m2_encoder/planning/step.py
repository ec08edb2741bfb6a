"""Time of one optimizer step, part by part.

The sum of what cannot overlap: encoding, contrast and its collectives, the part of the gradients' reduction that no
computation hides, the optimizer, and waiting for slow ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from m2_encoder.planning.communication import CommunicationCost, contrastive_bytes
from m2_encoder.planning.cost import ModelCost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.memory import Memory, count_logits, estimate_memory
from m2_encoder.planning.network import gather_seconds, reduce_seconds, waiting_seconds
from m2_encoder.planning.setting import Setting

_FP32 = 4
_STATISTICS_BYTES = 8  # two logsumexps of a row
_TRAFFIC_PER_LOGIT = {"full_logits": 36, "local_loss": 36, "local_form": 24}
"""Bytes of device memory that a logit moves, per direction. A materialised head moves 72 for a logit that serves both;
a tile is written and read once in forward, and written, weighted and read twice in backward."""
_OPTIMIZER_TRAFFIC = 40  # bytes a parameter: AdamW reads p, g, m, v, writes p, m, v; clipping reads g twice, writes it
_BUCKET_BYTES = 25 * 2**20  # DDP's default


class StepTime(NamedTuple):
    """Seconds of an optimizer step."""

    forward: float
    recomputation: float  # encoding again, by micro-batches or layers
    backward: float
    contrast: float
    contrast_communication: float  # collectives of the contrast; nothing runs meanwhile
    gradient_communication: float  # the part of the gradients' (and FSDP2's parameters') traffic that nothing hides
    optimizer: float
    waiting: float  # for slow ranks, expected

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Prediction(NamedTuple):
    """What a setting costs."""

    setting: Setting
    time: StepTime
    memory: Memory
    communication: CommunicationCost  # of the contrast, per rank and step
    gradient_bytes: float  # what a rank sends for gradients (and FSDP2's parameters) in a step
    logits: int  # of a rank and step, each direction counted

    @property
    def pairs_per_s(self) -> float:
        """Pairs of an image and a text that all ranks train on in a second."""
        return self.setting.global_rows / self.time.total


def predict(cost: ModelCost, hardware: Hardware, setting: Setting) -> Prediction:
    """Time, memory and traffic of one setting."""
    gradient_bytes, gradient_seconds = _gradient_traffic(cost, hardware, setting)
    forward = setting.local_rows * cost.forward_flops / hardware.flops_per_s
    backward = setting.local_rows * cost.backward_flops / hardware.flops_per_s
    again = forward * (setting.encodes_again + setting.activation_checkpointing)
    hidden = _hiding_seconds(hardware, setting, forward=forward, backward=backward, again=again)
    share = setting.world_size if setting.strategy == "grouped_fsdp" else 1
    traffic = _OPTIMIZER_TRAFFIC * cost.trainable_parameters / share
    return Prediction(
        setting=setting,
        time=StepTime(
            forward=forward,
            recomputation=again,
            backward=backward,
            contrast=_contrast_seconds(cost, hardware, setting),
            contrast_communication=_contrast_traffic_seconds(cost, hardware, setting),
            gradient_communication=max(0.0, gradient_seconds - hidden),
            optimizer=traffic / (hardware.memory_gb_per_s * 1e9),
            waiting=_waiting_seconds(hardware, setting, forward=forward, rest=backward + again),
        ),
        memory=estimate_memory(cost, hardware, setting),
        communication=contrastive_bytes(
            setting.method,
            world_size=setting.world_size,
            group_size=setting.group_size,
            rows=setting.rows,
            micro_batches=setting.micro_batches,
            feature_dim=cost.feature_dim,
            bytes_per_element=setting.feature_bytes,
            heads=cost.heads,
        ),
        gradient_bytes=gradient_bytes,
        logits=count_logits(setting, heads=cost.heads),
    )


def _contrast_seconds(cost: ModelCost, hardware: Hardware, setting: Setting) -> float:
    """Three products per logit and direction: itself and two gradients; `full_logits` shares them between directions.

    Materialised heads multiply as autocast says, the local form in the precision of the features it is given.
    """
    logits = count_logits(setting, heads=cost.heads)
    products = 3 if setting.method == "full_logits" else 6
    halves = setting.feature_bytes <= 2 if setting.method == "local_form" else cost.autocast_bytes_per_parameter > 0
    peak = hardware.peak_tflops if halves else hardware.peak_tflops_fp32
    arithmetic = products * cost.feature_dim * logits / (peak * 1e12 * hardware.mfu)
    return arithmetic + _TRAFFIC_PER_LOGIT[setting.method] * logits / (hardware.memory_gb_per_s * 1e9)


def _contrast_traffic_seconds(cost: ModelCost, hardware: Hardware, setting: Setting) -> float:
    element = cost.feature_dim * setting.feature_bytes
    if setting.method == "local_form":
        rows = cost.heads * setting.local_rows
        return sum(
            gather_seconds(hardware, ranks=setting.group_size, bytes_per_rank=rows * row_bytes)
            for row_bytes in (2 * element, _STATISTICS_BYTES)
        )
    once = gather_seconds(hardware, ranks=setting.world_size, bytes_per_rank=setting.rows * element)
    return 4 * setting.micro_batches * cost.heads * once


def _gradient_traffic(cost: ModelCost, hardware: Hardware, setting: Setting) -> tuple[float, float]:
    """Bytes that a rank sends for gradients and parameters in a step, and their seconds if nothing hid them."""
    ranks = setting.world_size
    others = (ranks - 1) / ranks
    if setting.strategy == "grouped_ddp":
        num_bytes = _FP32 * cost.trainable_parameters
        buckets = math.ceil(num_bytes / _BUCKET_BYTES)
        seconds = reduce_seconds(hardware, ranks=ranks, num_bytes=num_bytes, messages=buckets)
        return 2 * others * num_bytes, seconds
    # Images and texts pass the layers one after the other, and each pass gathers a layer's both experts: forward,
    # backward and every recomputation. Each pass of each micro-batch reduces its gradients.
    gathers = 2 * setting.micro_batches * (2 + setting.encodes_again + setting.activation_checkpointing)
    reductions = 2 * setting.micro_batches
    layers = cost.parameters - cost.root_parameters
    gathered = (cost.autocast_bytes_per_parameter or _FP32) * layers + _FP32 * cost.root_parameters
    reduced = _FP32 * cost.trainable_parameters
    messages = cost.num_layers + 1
    seconds = messages * (
        gathers * gather_seconds(hardware, ranks=ranks, bytes_per_rank=gathered / messages / ranks)
        + reductions * gather_seconds(hardware, ranks=ranks, bytes_per_rank=reduced / messages / ranks)
    )
    return others * (gathers * gathered + reductions * reduced), seconds


def _hiding_seconds(hardware: Hardware, setting: Setting, *, forward: float, backward: float, again: float) -> float:
    """Computation that traffic of gradients can hide behind.

    DDP has a gradient when all micro-batches have contributed to it, which is in the backward pass of the last one.
    FSDP2 moves layers during all passes.
    """
    if setting.strategy == "grouped_ddp":
        return hardware.overlap * backward / setting.micro_batches
    return hardware.overlap * (forward + backward + again)


def _waiting_seconds(hardware: Hardware, setting: Setting, *, forward: float, rest: float) -> float:
    """Expected waiting, from independent errors of a step's forward and backward computation.

    The local form meets in its group when everything is encoded. A loss for each of k micro-batches makes all ranks
    meet k times; a k-th of the computation has 1/sqrt(k) of the error. FSDP2 makes all ranks meet in every layer;
    prefetching forgives most of that, so they are taken to meet as often as in one loss over all ranks.
    """
    std, k = hardware.straggler_std, setting.micro_batches
    everyone = {"group_size": setting.world_size, "world_size": setting.world_size}
    if setting.strategy == "grouped_fsdp":
        return waiting_seconds(std * forward, std * rest, **everyone)
    if setting.method == "local_form":
        return waiting_seconds(std * forward, std * rest, group_size=setting.group_size, world_size=setting.world_size)
    # k meetings of all ranks: after a first forward, then after each backward and the next forward; at last after one.
    root = math.sqrt(k)
    middle = (k - 1) * waiting_seconds(math.hypot(std * forward / root, std * rest / root), 0.0, **everyone)
    return middle + waiting_seconds(std * forward / root, std * rest / root, **everyone)
