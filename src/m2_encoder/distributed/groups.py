"""Contrastive process groups, for any loop in which `torch.distributed` is initialised."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from m2_encoder.distributed.topology import GroupTopology, group_sizes
from m2_encoder.errors import UserError


def make_group(group_size: int, *, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Cut all ranks into groups of consecutive ones; collective: every rank calls it, once.

    Args:
        group_size: ranks per group. It divides the ranks, and where a launcher such as torchrun says how many of them
            a machine has (`LOCAL_WORLD_SIZE`), a group lies in one machine or consists of whole ones.
        timeout: of a collective; None for torch's own.

    Returns:
        The group that holds this rank; None for a group of one, which needs none. Free it by
        `torch.distributed.destroy_process_group`.

    Raises:
        UserError: if the ranks cannot be cut so. Without a process group there is one rank.
    """
    is_alone = not (dist.is_available() and dist.is_initialized())
    ranks = 1 if is_alone else dist.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    allowed = group_sizes(world_size=ranks, ranks_per_node=per_node if ranks % per_node == 0 else ranks)
    if isinstance(group_size, bool) or group_size not in allowed:
        whole = "" if per_node >= ranks else f" and lie in one node of {per_node}, or be whole nodes"
        hint = "; call torch.distributed.init_process_group first" if is_alone else ""
        rule = f"must divide the {ranks} rank(s){whole}; use one of {', '.join(map(str, allowed))}{hint}"
        raise UserError(rule, key="group_size", value=group_size)
    return open_groups(GroupTopology(ranks, group_size), timeout=timeout) if group_size > 1 else None


def open_groups(topology: GroupTopology, *, timeout: timedelta | None) -> dist.ProcessGroup:
    """Make every group, on all ranks in the same order, as NCCL needs; the one of this rank. One group is the world."""
    if topology.num_groups == 1:
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is initialised"
        return world
    groups = [dist.new_group(list(members), timeout=timeout) for members in topology.groups()]
    own = groups[topology.group_index(dist.get_rank())]
    assert isinstance(own, dist.ProcessGroup), f"rank {dist.get_rank()} is not in its own group"
    return own
