"""The text of `--help`: what a command does, an example, and what can be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

_FLAGS = (
    ("--help, -h", "this text"),
    (
        "--cfg job",
        "print the composed configuration instead of running (add --resolve to fill in references)",
    ),
    ("--multirun, -m", "run every combination of comma-separated values, as in optimizer.lr=1e-3,2e-3"),
    ("--config-path, --config-name", "use another primary configuration, such as a run's config.yaml"),
    ("--config-dir", "a folder of your own with more groups and experiments"),
)


class Described(Protocol):
    """The part of a command that its help shows."""

    @property
    def name(self) -> str:
        """What the user types."""

    @property
    def summary(self) -> str:
        """One sentence."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Command lines."""

    @property
    def notes(self) -> tuple[str, ...]:
        """More lines."""


def render_help(command: Described, groups: Mapping[str, Sequence[str]]) -> str:
    """Help of one command.

    Args:
        command: what is described.
        groups: configuration groups with their options.
    """
    lines = [f"{command.name}: {command.summary}", "", "Examples:"]
    lines += [f"  {example}" for example in command.examples]
    if groups:
        width = max(len(group) for group in groups)
        lines += ["", "Groups (choose with group=option; experiments with +experiment=option):"]
        lines += [f"  {group:<{width}}  {' | '.join(options)}" for group, options in groups.items()]
    lines += [
        "",
        "Any value of the configuration can be given as key=value; --cfg job lists them all.",
        "",
        "Flags:",
    ]
    width = max(len(flag) for flag, _ in _FLAGS)
    lines += [f"  {flag:<{width}}  {text}" for flag, text in _FLAGS]
    if command.notes:
        lines += ["", *command.notes]
    return "\n".join(lines)
