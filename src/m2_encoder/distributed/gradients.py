"""Gradients when some parameters are split over ranks and others are whole on each of them.

Split parameters are DTensors on a mesh with one axis, in rows (FSDP2); everything here also takes plain tensors alone.
"""

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
    """Average the gradients of whole parameters over ranks, each as soon as backward has it: what DDP does.

    Args:
        parameters: whole on every rank, trainable, in the same order on all ranks.
        group: ranks to average over; None is all of them.

    Returns:
        Handles that undo it. A gradient that was averaged before and is added to stays right.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))

    return [parameter.register_post_accumulate_grad_hook(average) for parameter in parameters]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float = math.inf) -> Tensor:
    """Scale gradients down to a global norm, wherever their parts are.

    Args:
        parameters: split and whole ones; at least one has a gradient, those without are left out.
        max_norm: the largest norm that stays as it is.

    Returns:
        The norm before, over all ranks, (), the same on each. If it is not finite, the gradients stay as they are, so
        that one can see which of them it was.
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
    """A tensor with all its rows; for a split one a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _square(gradients: list[Tensor]) -> Tensor:
    """Squared norm of all of them together, fp32 at least."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack([norm.to(dtype) for norm in torch._foreach_norm(gradients)]).square().sum()
