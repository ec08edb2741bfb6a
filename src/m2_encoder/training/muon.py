"""Muon: momentum whose matrices are orthogonalised, for the hidden matrices of a transformer.

torch ships the same rule as `torch.optim.Muon`, which iterates in bfloat16. Processors without bfloat16 arithmetic run
that many times slower than the training step itself, so the iteration here is in fp32; matrices of one shape go
through it together.

Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the learning rate is
matched to AdamW's as in "Muon is scalable for LLM training" (arXiv:2502.16982), Eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest slope at 0 of the quintics that keep singular values near 1
_EPS = 1e-7
_ADAMW_RMS = 0.2  # typical root mean square of an AdamW update


@torch.no_grad()
def orthogonalize(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by values near 1, with Newton-Schulz iterations.

    Args:
        matrices: (count, rows, columns), floating.
        steps: iterations; five bring singular values within about 0.7..1.2.

    Returns:
        fp32, of the same shape; each with (nearly) the singular vectors of its input.
    """
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPS)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. For matrices only.

    Args:
        params: parameters or groups, all two-dimensional.
        lr: learning rate; an update has AdamW's usual size at the same value.
        momentum: decay of the gradients' running sum.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            wrong = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if wrong:
                raise ValueError(f"Muon is for matrices; got parameters of shape {wrong[:3]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(buffer, group["momentum"]))
        size = _ADAMW_RMS * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonalize(torch.stack(directions)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)


class MuonWithAdamW(Optimizer):
    """Muon for some parameters, AdamW for the others, as one optimizer with one state and one schedule.

    Args:
        muon: groups for Muon; every group has its own `lr` and `weight_decay`.
        adamw: groups for AdamW.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        *,
        muon: Sequence[dict[str, Any]],
        adamw: Sequence[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ) -> None:
        self._parts: tuple[Muon, AdamW] = (
            Muon(list(muon), lr=muon[0]["lr"], momentum=momentum),
            AdamW(list(adamw), lr=adamw[0]["lr"], betas=betas, eps=eps),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Let a schedule that sets a group's learning rate here reach the part that uses it."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of both parts."""
        muon, adamw = self._parts
        return {"muon": muon.state_dict(), "adamw": adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both parts."""
        names = [group.get("name") for group in self.param_groups]
        muon, adamw = self._parts
        muon.load_state_dict(state_dict["muon"])
        adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()
        for name, group in zip(names, self.param_groups, strict=True):
            group.setdefault("name", name)  # of checkpoints of earlier versions
