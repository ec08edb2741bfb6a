"""Gradients of parameters of which some are sharded over ranks: DTensors on a mesh with one axis, as of FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def average_over_ranks(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> list[RemovableHandle]:
    """Average the gradients of whole parameters over ranks, each as soon as backward has it, as DDP does.

    Args:
        parameters: whole on every rank, trainable, in the same order on all ranks.
        group: ranks to average over; None for all.

    Returns:
        Handles that undo it. Gradients may accumulate over several backward passes.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))

    return [parameter.register_post_accumulate_grad_hook(average) for parameter in parameters]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float = math.inf) -> Tensor:
    """Clip gradients of sharded and whole parameters by their global norm; at least one has a gradient.

    Returns:
        The norm before, over all ranks, (), the same on each. If it is not finite, gradients stay as they are, so that
        the cause can be found.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    shards = [gradient.to_local() for gradient in split]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = _square(shards or whole)
    if split:
        dist.all_reduce(square, group=split[0].device_mesh.get_group())
        square = square + _square(whole) if whole else square
    norm = square.sqrt()
    scale = torch.where(norm.isfinite(), (max_norm / (norm + _EPS)).clamp(max=1.0), torch.ones_like(norm))
    for part in filter(None, (shards, whole)):
        torch._foreach_mul_(part, scale)
    return norm


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _square(gradients: list[Tensor]) -> Tensor:
    """Squared norm of all of them together, fp32 at least."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack([norm.to(dtype) for norm in torch._foreach_norm(gradients)]).square().sum()
