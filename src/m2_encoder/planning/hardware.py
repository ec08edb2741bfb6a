"""Constants of a cluster that predictions rest on; the numbers and their sources are in `conf/cluster/hardware/`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Gt, Le

from m2_encoder.bounds import Count, Fraction, NotNegative, Positive, check_fields
from m2_encoder.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Devices and links of a cluster. GB are 10^9 bytes; bandwidths count one direction.

    Attributes:
        devices_per_node: ranks of a node.
        device_memory_gb: memory of a device.
        reserved_memory_gb: what contexts, communication buffers and fragments take of it.
        peak_tflops: dense matrix products in the precision that the encoder trains in, 10^12 operations a second.
        peak_tflops_fp32: in fp32.
        mfu: share of the peak that the encoder reaches, in (0, 1].
        memory_gb_per_s: bandwidth of a device's own memory.
        intra_node_gb_per_s: what a device sends to the others of its node.
        intra_node_latency_us: of a ring's step inside a node.
        inter_node_gb_per_s: what a whole node sends to other nodes.
        inter_node_latency_us: of a ring's step between nodes.
        collective_latency_us: of starting any collective.
        overlap: share of the backward pass that can hide the reduction of gradients, in [0, 1].
        straggler_std: standard deviation, over ranks and steps, of the time of all forward passes of a step, and of all
            backward passes, relative to their mean.

    Raises:
        UserError: if a value is impossible; all of them are listed at once.
    """

    devices_per_node: Count
    device_memory_gb: Positive
    reserved_memory_gb: NotNegative
    peak_tflops: Positive
    peak_tflops_fp32: Positive
    mfu: Annotated[float, Gt(0), Le(1)]
    memory_gb_per_s: Positive
    intra_node_gb_per_s: Positive
    intra_node_latency_us: NotNegative
    inter_node_gb_per_s: Positive
    inter_node_latency_us: NotNegative
    collective_latency_us: NotNegative
    overlap: Fraction
    straggler_std: NotNegative

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hardware:
        """Build from plain values.

        Raises:
            UserError: for unknown, missing or impossible values.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            near = [find for name in unknown for find in difflib.get_close_matches(name, known, n=1)]
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            raise UserError(f"unknown hardware constant(s) {', '.join(unknown)}{hint}; known: {', '.join(known)}")
        if missing := [name for name in known if name not in values]:
            raise UserError(f"missing hardware constant(s): {', '.join(missing)}")
        return cls(**values)

    @property
    def flops_per_s(self) -> float:
        """Operations a second that the encoder reaches."""
        return self.peak_tflops * 1e12 * self.mfu
