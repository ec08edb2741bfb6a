from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.network import gather_seconds, reduce_seconds, waiting_seconds

CLUSTER = Hardware(
    devices_per_node=4, device_memory_gb=80, reserved_memory_gb=0, peak_tflops=100, peak_tflops_fp32=10, mfu=0.5,
    memory_gb_per_s=1000, intra_node_gb_per_s=100, intra_node_latency_us=2, inter_node_gb_per_s=10,
    inter_node_latency_us=20, collective_latency_us=5, overlap=0.5, straggler_std=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "microseconds"),
    [
        (1, 0),
        (4, 5 + 3 * 2 + 3 * 1e6 / 100e9 * 1e6),  # inside a node
        (8, 5 + 6 * 2 + 1 * 20 + 7 * 1e6 / 10e9 * 1e6),  # two nodes: one step of the ring leaves the node
        (16, 5 + 12 * 2 + 3 * 20 + 15 * 1e6 / 10e9 * 1e6),
    ],
)
def test_gather_by_hand(ranks: int, microseconds: float) -> None:
    assert gather_seconds(CLUSTER, ranks=ranks, bytes_per_rank=1e6) * 1e6 == pytest.approx(microseconds)


def test_reduce_by_hand() -> None:
    inside = 2 * 3 / 4 * 1e6 / 100e9 * 1e6
    assert reduce_seconds(CLUSTER, ranks=4, num_bytes=1e6) * 1e6 == pytest.approx(5 + 2 * 3 * 2 + inside)
    # a tree over four nodes has depth 2, the ring would take 12 steps inside and 3 between, twice
    between = 2 * 15 / 16 * 1e6 / 10e9 * 1e6
    assert reduce_seconds(CLUSTER, ranks=16, num_bytes=1e6) * 1e6 == pytest.approx(5 + 2 * (3 * 2 + 2 * 20) + between)
    assert reduce_seconds(CLUSTER, ranks=1, num_bytes=1e6) == 0


def test_messages_cost_latency_alone() -> None:
    one = reduce_seconds(CLUSTER, ranks=16, num_bytes=1e8)
    many = reduce_seconds(CLUSTER, ranks=16, num_bytes=1e8, messages=11)
    assert many - one == pytest.approx(10 * 97e-6)


def test_a_device_per_node_has_only_the_slow_link() -> None:
    alone = dataclasses.replace(CLUSTER, devices_per_node=1)
    assert gather_seconds(alone, ranks=4, bytes_per_rank=1e6) == pytest.approx(5e-6 + 3 * 20e-6 + 3 * 1e6 / 10e9)


@given(ranks=st.integers(2, 64), more=st.integers(1, 64), size=st.floats(0, 1e9))
def test_more_ranks_never_gather_faster(ranks: int, more: int, size: float) -> None:
    fewer = gather_seconds(CLUSTER, ranks=ranks, bytes_per_rank=size)
    assert gather_seconds(CLUSTER, ranks=ranks + more, bytes_per_rank=size) >= fewer


@pytest.mark.parametrize(("group_size", "world_size"), [(1, 64), (8, 64), (64, 64), (4, 4)])
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 2.0), (0.5, 0.1), (0.0, 1.0)])
def test_waiting_is_what_a_simulation_gives(group_size: int, world_size: int, forward: float, backward: float) -> None:
    random = np.random.default_rng(7)
    shape = (20_000, world_size // group_size, group_size)
    arrivals = random.normal(0, forward, shape).max(axis=2) + random.normal(0, backward, shape).max(axis=2)
    simulated = arrivals.max(axis=1)
    expected = waiting_seconds(forward, backward, group_size=group_size, world_size=world_size)
    assert expected == pytest.approx(simulated.mean(), abs=5 * simulated.std() / len(simulated) ** 0.5 + 0.005)


@given(
    forward=st.floats(0.01, 10), backward=st.floats(0.01, 10), small=st.integers(0, 5), larger=st.integers(0, 5),
    groups=st.integers(0, 3),
)  # fmt: skip
def test_smaller_groups_never_wait_longer(
    forward: float, backward: float, small: int, larger: int, groups: int
) -> None:
    world = 2 ** (small + larger + groups)
    waits = [
        waiting_seconds(forward, backward, group_size=2**power, world_size=world)
        for power in (small, small + larger, small + larger + groups)
    ]
    assert waits[0] <= waits[1] + 1e-6
    assert waits[1] <= waits[2] + 1e-6


def test_no_jitter_no_waiting() -> None:
    assert waiting_seconds(0, 0, group_size=8, world_size=64) == 0
    assert waiting_seconds(1, 1, group_size=1, world_size=1) == 0
