"""A table of what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn


class Part(NamedTuple):
    """A part of a module."""

    name: str  # the beginning of its parameters' names; of a layer with experts, the expert
    parameters: int
    trainable: int


class ModelSummary(Callback):
    """Prints the parameters of towers and parts before the first step, and how many of them are trained."""

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print it, on the first rank."""
        if trainer.is_global_zero:
            self._console.print(_table(find_parts(pl_module.named_parameters())))


def find_parts(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Part]:
    """Named parameters by part, in their order; those that are split over ranks count whole."""
    found: dict[str, Part] = {}
    for name, parameter in parameters:
        *head, _ = name.split(".")
        expert = [word for word in head if word.endswith("_expert")]
        label = ".".join([*head[:2], *(expert[:1] if expert[:1] != head[1:2] else [])]) if head[1:] else name
        old = found.get(label, Part(label, 0, 0))
        count = parameter.numel()
        found[label] = Part(label, old.parameters + count, old.trainable + count * parameter.requires_grad)
    return list(found.values())


def _table(parts: list[Part]) -> Table:
    table = Table("part", "parameters", "share", "trained", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    whole = sum(part.parameters for part in parts)
    for part in (*parts, Part("all", whole, sum(part.trainable for part in parts))):
        table.add_row(
            part.name, f"{part.parameters:,}", f"{part.parameters / max(1, whole):.1%}", f"{part.trainable:,}",
            style="bold" if part.name == "all" else "",
        )  # fmt: skip
    return table
