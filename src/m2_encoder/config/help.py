"""The text of `--help`: what a command does, an example, and what can be chosen."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

_WIDTH: Final = 116
_FLAGS: Final = (
    ("--help, -h", "this text"),
    ("--cfg job", "print the composed configuration instead of running (--resolve fills in references)"),
    ("--multirun, -m", "run every combination of comma-separated values, as in optimizer.lr=1e-3,2e-3"),
    ("--config-path, --config-name", "use another primary configuration, such as a run's config.yaml"),
    ("--config-dir", "a folder of your own with more groups and experiments"),
)
_VALUE: Final = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>(?: [^#]*)?)(?:# (?P<comment>.*))?")


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


def render_help(
    command: Described,
    groups: Mapping[str, Sequence[str]],
    *,
    chosen: Mapping[str, Collection[str]],
    values: Sequence[tuple[str, str]],
) -> str:
    """Help of one command: `groups` with all options, `chosen` with the default ones, `values` as `read_values`."""
    lines = [f"{command.name}: {command.summary}", "", "Examples:"]
    lines += [f"  {example}" for example in command.examples]
    if groups:
        rows = [
            (group, " | ".join(f"{option}*" if option in chosen.get(group, ()) else option for option in options))
            for group, options in groups.items()
        ]
        lines += ["", "Groups (choose with group=option, experiments with +experiment=option; * is the default):"]
        lines += _columns(rows)
    if values:
        lines += ["", "Values (??? must be given, null is off):", *_columns(values)]
    if groups:
        lines += ["", "Any other value can be given as key=value, too, as in the examples; --cfg job lists them all."]
    lines += ["", "Flags:", *_columns(_FLAGS)]
    if command.notes:
        lines += ["", *command.notes]
    return "\n".join(lines)


def read_values(path: Path) -> list[tuple[str, str]]:
    """Every value of a YAML file, one key a line, as `key=default`, with the comment behind it; no defaults list."""
    above: dict[int, str] = {}
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = _VALUE.fullmatch(line)
        if found is None or found["key"] == "defaults":
            continue
        indent, value = len(found["indent"]), found["value"].strip()
        above = {depth: key for depth, key in above.items() if depth < indent} | {indent: found["key"]}
        if value:
            values.append((f"{'.'.join(above.values())}={value}", found["comment"] or ""))
    return values


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns, the second one folded."""
    width = max(len(first) for first, _ in rows)
    lines = []
    for first, second in rows:
        label = first
        for text in textwrap.wrap(second, max(40, _WIDTH - width - 4)) or [""]:
            lines.append(f"  {label:<{width}}  {text}".rstrip())
            label = ""
    return lines
