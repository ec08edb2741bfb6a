"""Steps whose gradient is not finite are skipped and counted; too many in a row end training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

_NAMED_PARAMETERS = 5


class NonFiniteError(UserError):
    """Too many steps in a row had a non-finite loss or gradient; the message holds the diagnosis."""


class NonFiniteGuard:
    """Counts steps whose gradient norm is not finite.

    A non-finite loss has a non-finite gradient, and gradients are averaged over ranks before, so that every rank sees
    the same norm.

    Attributes:
        total: skipped steps of the run, resumed parts included.
        in_a_row: skipped steps since the last good one.
    """

    def __init__(self, *, max_in_a_row: int) -> None:
        if max_in_a_row < 1:
            raise UserError(f"max_skipped_in_a_row={max_in_a_row!r} must be 1 or more")
        self.max_in_a_row = max_in_a_row
        self.total = 0
        self.in_a_row = 0

    def observe(
        self,
        norm: Tensor,
        *,
        step: int,
        losses: Mapping[str, Tensor],
        parameters: Iterable[tuple[str, nn.Parameter]],
    ) -> bool:
        """Whether the step must be skipped, by its gradient norm, (); the other arguments are for the diagnosis.

        Raises:
            NonFiniteError: after `max_in_a_row` such steps in a row.
        """
        if bool(torch.isfinite(norm)):
            self.in_a_row = 0
            return False
        self.total += 1
        self.in_a_row += 1
        diagnosis = _diagnose(step, losses, parameters)
        logger.warning("skipped: %s (%d in a row, %d in all)", diagnosis, self.in_a_row, self.total)
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a non-finite gradient; the last one: {diagnosis}. "
                "Lower optimizer.lr, lengthen scheduler.warmup_steps, or set trainer.precision=32-true"
            )
        return True

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counters."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _diagnose(step: int, losses: Mapping[str, Tensor], parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    bad = [
        name for name, p in parameters if p.grad is not None and not bool(torch.isfinite(whole_tensor(p.grad)).all())
    ]
    shown = ", ".join(bad[:_NAMED_PARAMETERS]) + (
        f" and {len(bad) - _NAMED_PARAMETERS} more" if len(bad) > _NAMED_PARAMETERS else ""
    )
    values = ", ".join(f"{name}={float(loss):.4g}" for name, loss in losses.items())
    return f"step {step}, losses {values or 'none'}, non-finite gradients in {shown or 'no single parameter'}"
