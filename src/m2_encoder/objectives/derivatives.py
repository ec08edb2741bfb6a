"""What the losses with derivatives of their own refuse: modes of differentiation that they do not have, and scales."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m2_encoder.errors import UserError

MAX_SCALE: Final = 2e4
"""Of exp(logit_scale). The published model, as CLIP, ends at 100; an exponential given for its log is beyond this."""


def refuse_forward_mode(name: str, *tensors: Tensor) -> None:
    """Refuse inputs that carry a tangent, of which such a loss would know nothing: its derivative would be 0.

    Args:
        name: of the loss.
        tensors: its inputs.

    Raises:
        UserError: under `torch.func.jvp`, `jacfwd` or `forward_ad.dual_level`.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise UserError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual_level); differentiate it backwards, by "
            "loss.backward() or torch.autograd.grad"
        )


def refuse_second_derivative(name: str) -> None:
    """Refuse `create_graph=True`; call it in backward, whose result torch would take for a constant.

    Raises:
        UserError: with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise UserError(f"{name} has no second derivative; call backward with create_graph=False")


def check_log_scales(log_scales: Tensor) -> None:
    """Refuse a scale that was exponentiated already; one synchronisation.

    Args:
        log_scales: of all heads, any shape; what is not finite passes, which training counts and skips.

    Raises:
        UserError: for a scale above `MAX_SCALE`.
    """
    scales = log_scales.detach()
    if bool(((scales > math.log(MAX_SCALE)) & scales.isfinite()).any()):
        largest = float(scales.max())
        raise UserError(
            f"logit_scale={largest:.4g} must be at most {math.log(MAX_SCALE):.4g}: it is the log of the inverse "
            f"temperature; if the scale is {largest:.4g}, give its log, {math.log(largest):.4g}"
        )
