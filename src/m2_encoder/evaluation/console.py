"""The terminal that commands print on; apart from `tables`, whose metrics take more than a second to import."""

from __future__ import annotations

from rich.console import Console

_WIDTH_WITHOUT_TERMINAL = 110


def open_console() -> Console:
    """A console on standard output that does not fold tables when it writes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)
