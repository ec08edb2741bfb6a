"""Overrides of a command line: each parsed on its own, and what is wrong with its form and its key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from m2_encoder.config.problems import nearest

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


def refuse_repeated(lines: Sequence[str]) -> list[str]:
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


def key_problem(override: Override, base: DictConfig) -> str | None:
    """What is wrong with the key of a value override, or None; unknown keys get the nearest known one.

    Hydra itself would name the first one only. Keys that are added with a plus are left to the checks of values.

    Args:
        override: not of a group.
        base: the configuration without the overrides of single keys, not in struct mode.
    """
    key, line = override.key_or_group, override.input_line
    if key == "hydra" or key.startswith("hydra."):
        return None
    node: Any = base
    above = ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return None if adds(override) and node is None else f"{line}: {above} is a value and holds no keys"
        if part not in _names(node):
            return None if adds(override) else _unknown_key(line, part, above, node)
        node, above = _peek(node, part), f"{above}.{part}".lstrip(".")
    if override.is_add() and node is not None and not isinstance(node, DictConfig | ListConfig):
        return f"{line}: {key} exists; leave out the +"
    if adds(override) or override.is_delete() or not isinstance(node, DictConfig):
        return None
    value = override.value()
    if isinstance(value, list) and value and "." not in key and all(isinstance(name, str) for name in value):
        return _option_problem(line, key, value, _names(node))
    return _unknown_inside(line, value, key, node)


def _names(node: DictConfig) -> list[str]:
    return [str(name) for name in node]  # `in` denies keys that are ???


def _peek(node: DictConfig, part: str) -> Any:
    return OmegaConf.select(node, part, throw_on_resolution_failure=False)


def _option_problem(line: str | None, key: str, options: Sequence[object], names: Sequence[str]) -> str:
    """Options are chosen where a saved configuration has what they define."""
    if unknown := [str(name) for name in options if name not in names]:
        fix = f"it has no options such as {', '.join(unknown)}; compose from conf/ for them"
    elif others := [f"~{key}.{name}" for name in names if name not in options]:
        fix = f"leave others out with {' '.join(others)}"
    else:
        fix = "leave it out"
    return f"{line}: {key} holds {', '.join(names)} here; {fix}"


def _unknown_inside(line: str | None, value: object, path: str, node: Any) -> str | None:
    """What is wrong with the keys of a mapping that is given as a value, or None."""
    if not isinstance(value, Mapping) or not isinstance(node, DictConfig):
        return None
    for name, item in value.items():
        if str(name) not in _names(node):
            return _unknown_key(line, str(name), path, node)
        if problem := _unknown_inside(line, item, f"{path}.{name}", _peek(node, str(name))):
            return problem
    return None


def _unknown_key(line: str | None, part: str, above: str, node: DictConfig) -> str:
    known = [name for name in _names(node) if not name.startswith("_") and (above or name != "hydra")]
    rule = f"{line}: {above or 'the configuration'} has no key {part!r}"
    near, fix = nearest(part, known), f"it has {', '.join(known) or 'none'}"
    if "_target_" in node and not near:
        fix += f"; other arguments of {node['_target_']} take a +, as in +{line}"
    return f"{rule}{near}; {fix}"
