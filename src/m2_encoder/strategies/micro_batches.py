"""Who encodes in micro-batches: a strategy only says how many; the module that it trains has to do it."""

from __future__ import annotations

import lightning

from m2_encoder.errors import UserError


def check_micro_batches(micro_batches: int, module: lightning.LightningModule) -> None:
    """Refuse a number of micro-batches that the module would ignore.

    Args:
        micro_batches: of the strategy.
        module: says that it encodes in so many pieces by a true attribute `reads_micro_batches`.

    Raises:
        UserError: for a module that does not, and more than one.
    """
    if micro_batches > 1 and not getattr(module, "reads_micro_batches", False):
        name = type(module).__name__
        raise UserError(
            f"must be 1 for {name}, which encodes all rows at once; or let it encode in trainer.strategy.micro_batches "
            "pieces (m2_encoder.objectives.in_pieces) and say so by a class attribute, reads_micro_batches = True",
            key="strategy.micro_batches",
            value=micro_batches,
        )
