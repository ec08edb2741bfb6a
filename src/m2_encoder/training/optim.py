"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from m2_encoder.errors import UserError

OptimizerFactory = Callable[[nn.Module], Optimizer]
SchedulerFactory = Callable[[Optimizer], LambdaLR]

_NO_DECAY_SUFFIXES = ("bias", "positions.weight", "cls_token", "mask_token", "logit_scale", "logit_vl_scale")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to norms, biases, positions, cls or scales."""
    return parameter.ndim >= 2 and not name.endswith(_NO_DECAY_SUFFIXES)


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Two groups of the parameters that want a gradient: with and without decay.

    Returns:
        Groups with `params`, `weight_decay` and the parameters' `names` (so that a log can say what is where).
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in _trainable(module):
        (decayed if is_decayed(name, parameter) else plain).append((name, parameter))
    return [
        {"params": [p for _, p in rows], "names": [n for n, _ in rows], "weight_decay": decay}
        for rows, decay in ((decayed, weight_decay), (plain, 0.0))
        if rows
    ]


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def build_optimizer(
    module: nn.Module,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
) -> AdamW:
    """AdamW with the field's parameter groups.

    Args:
        module: its parameters with `requires_grad` are trained.
        lr: peak learning rate; the scheduler multiplies it.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, on matrices and convolutions only (`is_decayed`).

    Raises:
        UserError: if nothing is trainable, or a number is impossible.

    Reference: AdamW (arXiv:1711.05101); values of CLIP (arXiv:2103.00020), Table 19-20.
    """
    groups = parameter_groups(module, weight_decay=weight_decay)
    if not groups:
        raise UserError("no parameter wants a gradient; there is nothing to train")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas={list(betas)} must be two numbers in [0, 1)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name}={value!r} must be 0 or more, and finite")
    first, second = betas
    return AdamW(groups, lr=lr, betas=(first, second), eps=eps)


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up to the peak, then half a cosine to `min_lr_ratio` of it at `max_steps`.

    Args:
        optimizer: its learning rates are the peaks.
        warmup_steps: steps until the peak; step t (from 0) of the warm-up runs at (t + 1) / warmup_steps of it.
        max_steps: step at which the cosine ends.
        min_lr_ratio: learning rate at the end over the peak, 0..1.

    Raises:
        UserError: if the warm-up does not fit into the steps, or the ratio is no share.

    Reference: SGDR (arXiv:1608.03983), one cycle.
    """
    if not 0 <= warmup_steps <= max_steps:
        raise UserError(f"warmup_steps={warmup_steps!r} must be in 0..max_steps={max_steps!r}")
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio={min_lr_ratio!r} must be in 0..1")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def warmup_constant(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Linear warm-up to the peak, which then stays.

    Raises:
        UserError: if `warmup_steps` is negative.
    """
    if warmup_steps < 0:
        raise UserError(f"warmup_steps={warmup_steps!r} must be 0 or more")
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
