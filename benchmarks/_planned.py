"""What the planner predicts for the settings of `grouped_training.py`, from constants measured there.

How fast a rank encodes, multiplies and copies, and what starting a collective costs, is measured once, over the links
without shaping and with all ranks at work; latency and bandwidth are those measured on the shaped links. The planner
knows nothing else of this machine. Where it is known to differ: it counts reductions as NCCL makes them, while gloo
runs a reduce-scatter as an all-reduce, and the backward of torch's gather as one scatter per rank; small pieces cost it
no more per row than large ones; a call costs it nothing but arithmetic and memory traffic, which makes its loss of
g = 1, all of it calls here, too good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from _candidates import Candidate

from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.planning.cost import ModelCost, estimate_cost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.setting import Setting
from m2_encoder.planning.step import StepTime, predict

_METHODS = {"full": "full_logits", "local": "local_loss", "local_fused": "local_loss", "grouped": "local_form"}
# Values without influence here: one rank per node leaves no links inside nodes, and memory is not asked for.
_UNUSED = {"device_memory_gb": 1.0, "reserved_memory_gb": 0.0, "intra_node_gb_per_s": 1.0, "intra_node_latency_us": 0.0}


class Planner:
    """Predictions for one machine.

    Args:
        world_size: ranks.
        rows: of a rank and step.
        constants: measured: `text_tokens` of a caption, `copy_gb_per_s` and `matmul_tflops` of a rank.
        unshaped: the row of the link without shaping: `all_reduce_one_ms`, `gradient_all_reduce_ms`.
        step_s: a step of ours with g = 1 and k = 1 over it, which encodes and reduces gradients, seconds.
    """

    def __init__(
        self,
        *,
        world_size: int,
        rows: int,
        constants: Mapping[str, float],
        unshaped: Mapping[str, Any],
        step_s: float,
    ) -> None:
        self._world_size, self._rows = world_size, rows
        tokens = round(constants["text_tokens"])
        self._cost = estimate_cost(NAME_TO_CONFIG["tiny"], precision="32-true", text_tokens=tokens)
        start_ms = unshaped["all_reduce_one_ms"]
        self._hardware = Hardware(
            devices_per_node=1,
            peak_tflops=constants["matmul_tflops"],
            peak_tflops_fp32=constants["matmul_tflops"],
            mfu=1.0,
            memory_gb_per_s=constants["copy_gb_per_s"],
            inter_node_gb_per_s=1.0,
            inter_node_latency_us=0.0,
            collective_latency_us=1e3 * start_ms,
            overlap=0.0,  # all gradients of this model fit into one bucket of DDP, which is complete at the end
            straggler_std=0.0,
            **_UNUSED,
        )
        alone = Candidate("", "grouped", 1, 1)
        rest = self._step(alone, unshaped, self._cost, rows)
        encoding_s = step_s - (rest.total - rest.forward - rest.backward)
        flops = rows * (self._cost.forward_flops + self._cost.backward_flops)
        self._hardware = dataclasses.replace(self._hardware, peak_tflops=flops / encoding_s / 1e12)

    def step_s(self, candidate: Candidate, link: Mapping[str, Any]) -> float:
        """Seconds of an optimizer step; `link` is the measured row of a link."""
        return self._step(candidate, link, self._cost, self._rows).total

    def loss_s(self, candidate: Candidate, link: Mapping[str, Any], shape: tuple[int, int]) -> float:
        """Seconds of the loss alone on features of a shape, rows and width."""
        cost = dataclasses.replace(self._cost, feature_dim=shape[1])
        step = self._step(candidate, link, cost, shape[0])
        return step.contrast + step.contrast_communication

    def _step(self, candidate: Candidate, link: Mapping[str, Any], cost: ModelCost, rows: int) -> StepTime:
        hardware = dataclasses.replace(
            self._hardware,
            inter_node_gb_per_s=link["mbit_per_s"] / 8e3,
            # A step of gloo's ring waits until the receiver has offered its buffer: a whole round trip.
            inter_node_latency_us=1e3 * link["round_trip_ms"],
        )
        setting = Setting(
            world_size=self._world_size,
            group_size=candidate.group_size,
            rows=rows // candidate.micro_batches,
            micro_batches=candidate.micro_batches,
            method=_METHODS[candidate.method],
        )
        return predict(cost, hardware, setting).time
