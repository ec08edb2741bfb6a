"""Overrides of a command line, each parsed on its own, and what is wrong with the form of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

_HYDRA_SYNTAX: Final = ("'", '"', "[", "{", "${")


def quote_unreadable(line: str, *, multirun: bool = False) -> str:
    """Puts the value of an override into quotes if Hydra cannot read it: paths with `=`, braces or Chinese.

    >>> quote_unreadable("images=a=b")
    'images="a=b"'

    Args:
        line: as typed. A value that begins like a list, a mapping, a text in quotes or an interpolation stays.
        multirun: commas separate values; a value that has some stays.
    """
    key, equals, value = line.partition("=")
    if not equals or value.startswith(_HYDRA_SYNTAX) or (multirun and "," in value) or parse_override(line) is not None:
        return line
    quoted = f"{key}={quote_value(value)}"
    return line if parse_override(quoted) is None else quoted


def quote_value(value: str) -> str:
    """A text in quotes for Hydra, which reads backslashes as they are, except in front of a quote."""
    quoted = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
    return f'"{quoted}"'


def repeated_shards(lines: Sequence[str]) -> list[str]:
    """Refuses `shards` that are given more than once.

    bash makes several arguments of braces outside of quotes, and Hydra would keep the last one alone.
    """
    keys = [line.partition("=")[0] for line in lines]
    return [
        f"{key} is given {keys.count(key)} times; put its braces in quotes, {key}='/data/{{000..099}}.tar', or give a "
        f"list: '{key}=[A,B]'"
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1 and key.rpartition(".")[2] == "shards"
    ]


def parse_overrides(
    lines: Sequence[str], suggest: Callable[[str], str] = lambda _: ""
) -> tuple[list[Override], list[str]]:
    """Parses each override on its own.

    Args:
        lines: as typed.
        suggest: gives a hint for a word that is no `key=value`.

    Returns:
        The ones that can be read, and one problem per other line.
    """
    parsed = [(line, parse_override(line)) for line in lines]
    problems = [
        f"{line}: cannot be read; write key=value, and quote special characters for both the shell and Hydra, as in "
        "'key=\"a b\"'"
        if "=" in line
        else f"{line}: has no value{suggest(line)}; write key=value"
        for line, override in parsed
        if override is None
    ]
    return [override for _, override in parsed if override is not None], problems


def parse_override(line: str) -> Override | None:
    """Parses one override; None if it cannot be read."""
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None


def adds(override: Override) -> bool:
    """Whether it may bring a key that is not there, as `+key` and `++key` do."""
    return override.is_add() or override.is_force_add()


def refuse_sweeps(overrides: Sequence[Override]) -> list[str]:
    """Problems of overrides that hold several values although one run was asked for."""
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            value = override.value()
            # Several lists or mappings are several choices; several plain values may be meant as one list.
            items = value.list if isinstance(value, ChoiceSweep) and value.simple_form else []
            plain = bool(items) and not any(isinstance(item, list | dict) for item in items)
            text = str(override.input_line).partition("=")[2]
            key = override.key_or_group
            hint = f"for a list write {key}=[{text}], for a text '{key}=\"{text}\"'; " if plain else ""
            problems.append(f"{override.input_line}: holds several values; {hint}to run them all add --multirun")
    return problems
