"""The progress of commands that encode files."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def show_encoding() -> Progress:
    """A bar on stderr; its tasks have the field `skipped`, a text."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[skipped]}"),
    )
    return Progress(*columns, console=Console(stderr=True))
