"""Groups partition the ranks, stay inside nodes or take whole ones, and a wrong size is told the right ones."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.distributed.topology import (
    GroupTopology,
    describe_contrastive_batch,
    divisors,
    group_sizes,
    resolve_group_size,
)
from m2_encoder.errors import UserError

clusters = st.tuples(st.integers(1, 24), st.integers(1, 16))  # nodes, ranks per node


@given(clusters, st.data())
def test_groups_partition_the_ranks_and_respect_nodes(cluster: tuple[int, int], data: st.DataObject) -> None:
    nodes, per_node = cluster
    world_size = nodes * per_node
    sizes = group_sizes(world_size=world_size, ranks_per_node=per_node)
    assert {1, per_node, world_size} <= set(sizes)
    topology = GroupTopology(world_size, data.draw(st.sampled_from(sizes)))

    assert [rank for members in topology.groups() for rank in members] == list(range(world_size))
    assert len(topology.groups()) == topology.num_groups
    for rank in range(world_size):
        members = topology.members(topology.group_index(rank))
        assert members[topology.group_rank(rank)] == rank
    for members in topology.groups():
        touched = {rank // per_node for rank in members}
        inside = len(touched) == 1
        whole = {rank for node in touched for rank in range(node * per_node, (node + 1) * per_node)} == set(members)
        assert inside or whole


@given(clusters, st.integers(-3, 500))
def test_a_size_is_taken_or_the_right_ones_are_named(cluster: tuple[int, int], group_size: int) -> None:
    nodes, per_node = cluster
    world_size = nodes * per_node
    fits = [
        g for g in range(1, world_size + 1) if world_size % g == 0 and (per_node % g == 0 or g % per_node == 0)
    ]  # by the definition, without divisors()
    if group_size in fits:
        assert resolve_group_size(world_size=world_size, ranks_per_node=per_node, group_size=group_size) == group_size
        return
    with pytest.raises(UserError) as caught:
        resolve_group_size(world_size=world_size, ranks_per_node=per_node, group_size=group_size)
    message = str(caught.value)
    assert message.startswith(f"strategy.group_size={group_size}:")
    assert "\n" not in message
    named = re.search(r"use one of ([\d, ]+)$", message)
    assert named is not None
    assert [int(number) for number in named[1].split(",")] == fits


@given(clusters, st.integers(-2, 30))
def test_whole_nodes(cluster: tuple[int, int], group_nodes: int) -> None:
    nodes, per_node = cluster
    world_size = nodes * per_node
    if group_nodes >= 1 and nodes % group_nodes == 0:
        size = resolve_group_size(world_size=world_size, ranks_per_node=per_node, group_nodes=group_nodes)
        assert size == group_nodes * per_node
        return
    with pytest.raises(UserError, match=rf"^strategy\.group_nodes={group_nodes}: .*use one of 1\b"):
        resolve_group_size(world_size=world_size, ranks_per_node=per_node, group_nodes=group_nodes)


def test_the_world_is_one_group_by_default() -> None:
    assert resolve_group_size(world_size=48, ranks_per_node=8) == 48


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UserError, match=r"group_nodes=1: must be null when strategy.group_size=4 is given"):
        resolve_group_size(world_size=8, ranks_per_node=4, group_size=4, group_nodes=1)


def test_a_size_that_divides_but_cuts_a_node_is_refused() -> None:
    with pytest.raises(UserError, match=r"one node of 6, or be whole nodes; use one of 1, 2, 3, 6, 12$"):
        resolve_group_size(world_size=12, ranks_per_node=6, group_size=4)


def test_true_is_no_size() -> None:
    with pytest.raises(UserError, match="group_size=True"):
        resolve_group_size(world_size=2, ranks_per_node=2, group_size=True)


@given(st.integers(1, 3000))
def test_divisors(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_the_batch_in_words() -> None:
    many = describe_contrastive_batch(GroupTopology(4, 2), micro_batches=4, rows_per_rank=64)
    assert many == "contrastive batch: 2 ranks x 4 micro-batches x 16 rows = 128 rows in each of 2 groups"
    one = describe_contrastive_batch(GroupTopology(1, 1), micro_batches=1, rows_per_rank=16)
    assert one == "contrastive batch: 1 rank x 1 micro-batch x 16 rows = 16 rows in one group"
