"""Time of collectives and of waiting for slow ranks: an alpha-beta model with links inside and between nodes.

A ring of n ranks passes n - 1 messages one after the other. Each costs a latency (alpha), and the bytes cost the
bandwidth (beta) of the slowest link. A ring through several nodes enters and leaves every node once, and the traffic
of its parallel copies has the whole node's bandwidth to other nodes. Contrastive groups are contiguous and
node-aligned, so no two of them share a node's links.

The latency of a ring counts its steps inside and between nodes as NCCL's own tuning does (NVIDIA/nccl,
src/graph/tuning.cc); an all-reduce may take a tree instead, whose latency grows with the logarithm of the nodes.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from m2_encoder.planning.hardware import Hardware

_GRID_STEP = 0.01  # of standard deviations, when distributions are integrated
_GRID_REACH = 8.0


def count_nodes(hardware: Hardware, ranks: int) -> int:
    """Nodes that contiguous, node-aligned ranks take."""
    return math.ceil(ranks / hardware.devices_per_node)


def gather_seconds(hardware: Hardware, *, ranks: int, bytes_per_rank: float) -> float:
    """Seconds of an all-gather in a ring, or a reduce-scatter, its reverse; each rank contributes `bytes_per_rank`."""
    if ranks == 1:
        return 0.0
    return _ring_latency(hardware, ranks) + (ranks - 1) * bytes_per_rank / _bandwidth(hardware, ranks)


def reduce_seconds(hardware: Hardware, *, ranks: int, num_bytes: float, messages: int = 1) -> float:
    """Seconds of an all-reduce of a whole buffer in `messages` pieces, in a ring or a tree, whichever is faster."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, hardware.devices_per_node) - 1
    depth = math.ceil(math.log2(count_nodes(hardware, ranks)))
    tree = inside * hardware.intra_node_latency_us + depth * hardware.inter_node_latency_us
    latency = min(
        hardware.collective_latency_us * 1e-6 + 2 * tree * 1e-6,
        2 * _ring_latency(hardware, ranks) - hardware.collective_latency_us * 1e-6,
    )
    return messages * latency + 2 * (ranks - 1) / ranks * num_bytes / _bandwidth(hardware, ranks)


def _ring_latency(hardware: Hardware, ranks: int) -> float:
    between = count_nodes(hardware, ranks) - 1
    inside = ranks - 1 - between
    microseconds = inside * hardware.intra_node_latency_us + between * hardware.inter_node_latency_us
    return (hardware.collective_latency_us + microseconds) * 1e-6


def _bandwidth(hardware: Hardware, ranks: int) -> float:
    """Bytes a second of the slowest link of a ring."""
    links = [hardware.intra_node_gb_per_s] if hardware.devices_per_node > 1 else []
    if count_nodes(hardware, ranks) > 1:
        links.append(hardware.inter_node_gb_per_s)
    return min(links) * 1e9


def waiting_seconds(forward_std: float, backward_std: float, *, group_size: int, world_size: int) -> float:
    """Expected time that jitter adds to a step whose ranks meet twice: in their group, then all of them.

    A rank's forward and backward pass deviate from their means by independent normal errors. After the forward pass the
    ranks of a group wait for the slowest of them, after the backward pass all ranks for the slowest of all: E[max over
    groups (max of the group's forward errors + max of its backward errors)]. The deviations are in seconds: of what
    precedes the group's meeting, and of what follows it.
    """
    scale = math.hypot(forward_std, backward_std)
    if scale == 0 or world_size == 1:
        return 0.0
    # Ratios are rounded, so that a search over many batch sizes integrates each shape of the problem once.
    share = round(forward_std / scale, 4)
    return scale * _expected_maximum(share, group_size, world_size // group_size)


@functools.lru_cache(maxsize=4096)
def _expected_maximum(forward_share: float, group_size: int, num_groups: int) -> float:
    """E[max of `num_groups` sums of two maxima of `group_size` normals], for forward² + backward² = 1."""
    backward_share = math.sqrt(max(0.0, 1 - forward_share**2))
    grid = np.arange(-_GRID_REACH, _GRID_REACH + _GRID_STEP / 2, _GRID_STEP)
    sums = np.convolve(
        _maximum_masses(grid, forward_share, group_size), _maximum_masses(grid, backward_share, group_size)
    )
    values = np.arange(len(sums)) * _GRID_STEP + 2 * grid[0]
    cumulated = np.clip(np.cumsum(sums), 0, 1) ** num_groups
    return float(values @ np.diff(cumulated, prepend=0.0))


def _maximum_masses(grid: np.ndarray, std: float, count: int) -> np.ndarray:
    """Probabilities of the maximum of `count` normals around the points of a grid."""
    if std == 0:
        return (np.abs(grid) < _GRID_STEP / 2).astype(float)
    edges = np.append(grid, grid[-1] + _GRID_STEP) - _GRID_STEP / 2
    below = np.array([0.5 * math.erfc(-edge / (std * math.sqrt(2))) for edge in edges]) ** count
    return np.diff(below)
