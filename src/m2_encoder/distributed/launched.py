"""Ranks that a launcher such as torchrun has started for a command that shares its work among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined_ranks(device: str) -> Iterator[dist.ProcessGroup | None]:
    """The group of all ranks while inside; None in a process that is alone. A GPU is that of the local rank."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield None
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
