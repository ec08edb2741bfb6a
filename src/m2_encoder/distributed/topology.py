"""Division of ranks into contrastive groups, as plain integers.

Groups are contiguous and aligned to nodes: a group lies inside one node or consists of whole nodes, so that its ranks
are near each other. Letters: W world size, g ranks per group, m ranks per node.
"""

from __future__ import annotations

from typing import NamedTuple

from m2_encoder.errors import UserError


class GroupTopology(NamedTuple):
    """Ranks 0..W-1, cut into groups of g consecutive ones."""

    world_size: int  # W
    group_size: int  # g; divides W

    @property
    def num_groups(self) -> int:
        """W / g."""
        return self.world_size // self.group_size

    def group_index(self, rank: int) -> int:
        """The group that holds a rank, 0..num_groups - 1."""
        return rank // self.group_size

    def group_rank(self, rank: int) -> int:
        """A rank's place in its group, 0..g - 1."""
        return rank % self.group_size

    def members(self, group_index: int) -> range:
        """Ranks of a group, ascending."""
        return range(group_index * self.group_size, (group_index + 1) * self.group_size)

    def groups(self) -> list[range]:
        """Ranks of every group."""
        return [self.members(index) for index in range(self.num_groups)]


def divisors(n: int) -> list[int]:
    """Positive divisors of a positive number, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def group_sizes(*, world_size: int, ranks_per_node: int) -> list[int]:
    """Sizes g that cut W ranks into equal groups, each inside one node or made of whole nodes, ascending."""
    return [g for g in divisors(world_size) if ranks_per_node % g == 0 or g % ranks_per_node == 0]


def resolve_group_size(
    *, world_size: int, ranks_per_node: int, group_size: int | None = None, group_nodes: int | None = None
) -> int:
    """Ranks per contrastive group, g.

    Args:
        world_size: W.
        ranks_per_node: m; divides W.
        group_size: requested ranks per group; None leaves it to `group_nodes`.
        group_nodes: requested whole nodes per group. With both None the world is one group.

    Raises:
        UserError: if both are given, the groups would not be equal, or one would hold a part of a node and more.
    """
    if group_size is not None and group_nodes is not None:
        rule = f"must be null when strategy.group_size={group_size} is given; keep one of the two"
        raise UserError(rule, key="strategy.group_nodes", value=group_nodes)
    if group_nodes is not None:
        nodes = world_size // ranks_per_node
        if not _is_one_of(group_nodes, divisors(nodes)):
            rule = f"must divide the {nodes} node(s); use one of {_listed(nodes)}"
            raise UserError(rule, key="strategy.group_nodes", value=group_nodes)
        return group_nodes * ranks_per_node
    if group_size is None:
        return world_size
    allowed = group_sizes(world_size=world_size, ranks_per_node=ranks_per_node)
    if not _is_one_of(group_size, allowed):
        whole = "" if ranks_per_node == world_size else f" and lie in one node of {ranks_per_node}, or be whole nodes"
        rule = f"must divide the {world_size} rank(s){whole}; use one of {', '.join(map(str, allowed))}"
        raise UserError(rule, key="strategy.group_size", value=group_size)
    return group_size


def describe_contrastive_batch(topology: GroupTopology, *, micro_batches: int, rows_per_rank: int) -> str:
    """The size of the contrastive batch in words; `rows_per_rank` are those of all micro-batches."""
    rows = rows_per_rank // micro_batches
    groups = f"each of {topology.num_groups} groups" if topology.num_groups > 1 else "one group"
    pieces = [
        f"{topology.group_size} rank{'s' if topology.group_size > 1 else ''}",
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}",
        f"{rows} row{'s' if rows > 1 else ''}",
    ]
    return f"contrastive batch: {' x '.join(pieces)} = {topology.group_size * rows_per_rank} rows in {groups}"


def _is_one_of(value: int, allowed: list[int]) -> bool:
    return not isinstance(value, bool) and value in allowed


def _listed(n: int) -> str:
    return ", ".join(map(str, divisors(n)))
