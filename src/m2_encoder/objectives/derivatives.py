"""What the losses with derivatives of their own refuse: modes of differentiation that they do not have, and scales."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m2_encoder.errors import UserError

MAX_SCALE: Final = 2e4
"""Of exp(logit_scale), 9.9 as a log: models end at 100 (4.6), exponentials start at 10 (SigLIP) or 14.3 (CLIP)."""


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
    """Refuse a scale that was exponentiated already, or is not finite.

    Reads one number from the device: call it where the loss has just waited for the device anyway.

    Args:
        log_scales: of all heads, any shape.

    Raises:
        UserError: for a scale above `MAX_SCALE`, an infinity or NaN.
    """
    scales = log_scales.detach()
    is_right = scales.isfinite() & (scales <= math.log(MAX_SCALE))
    if bool(is_right.all()):
        return
    wrong = float(scales[~is_right].flatten()[0])
    if not math.isfinite(wrong):
        raise UserError(
            f"logit_scale={wrong} must be finite: it is the log of the inverse temperature; give model.logit_scale, "
            "not its exp(); or has an update made it so? Then lower the learning rate, or clamp the scale"
        )
    raise UserError(
        f"logit_scale={wrong:.4g} must be at most {math.log(MAX_SCALE):.4g}: it is the log of the inverse temperature; "
        f"give model.logit_scale, not its exp(); of a scale that is {wrong:.4g}, give the log, {math.log(wrong):.4g}"
    )
