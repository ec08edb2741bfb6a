"""Overrides of a command line: each parsed on its own, and what is wrong with its form and its key."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from m2_encoder.config.problems import nearest
from m2_encoder.errors import NOTHING, Problem

_MAX_KEY: Final = 200
_HYDRA_SYNTAX: Final = ("'", '"', "[", "{")
_NESTED: Final = re.compile(r"\$\{[^{}]*(\$\{[^{}]*\}[^{}]*)+\}")
"""An interpolation within one, which Hydra reads in quotes only."""
_NAMED: Final = ("data.sources", "data.validation", "data.columns")  # their keys are names that the user chooses
_LATE_GROUPS: Final = ("debug",)  # whose values count more than those of an experiment


def put_last(lines: Sequence[str]) -> list[str]:
    """Adds `debug=...` behind an experiment, so that its values count; single ones still count more than both."""
    late = [line for line in lines if line.lstrip("+").partition("=")[0] in _LATE_GROUPS]
    others = [line for line in lines if line not in late]
    return [*others, *(f"+{line.lstrip('+')}" for line in late if line.partition("=")[2] != "null")]


def quote_unreadable(line: str, *, multirun: bool = False) -> str:
    """Puts the value of an override into quotes if Hydra cannot read it: paths with `=`, braces or Chinese.

    A value that is a path that exists is one path, whatever is in its name.

    >>> quote_unreadable("images=a=b")
    'images="a=b"'

    Args:
        line: as typed. A value that begins like a list, a mapping, a text in quotes or an interpolation stays.
        multirun: commas separate values; a value that has some stays.
    """
    key, equals, value = line.partition("=")
    if _NESTED.fullmatch(value):
        return f"{key}={quote_value(value)}"
    if not equals or value.startswith((*_HYDRA_SYNTAX, "${")) or (multirun and "," in value):
        return line
    if parse_override(line) is not None and not ("," in value and os.path.exists(os.path.expanduser(value))):
        return line
    quoted = f"{key}={quote_value(value)}"
    return line if parse_override(quoted) is None else quoted


def quote_value(value: str) -> str:
    """A text in quotes for Hydra, which reads backslashes as they are, except in front of a quote."""
    quoted = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), value)
    return f'"{quoted}"'


def line_problem(line: object, rule: str, fix: str = "") -> Problem:
    """What is wrong with an override, which is shown as it was typed."""
    return Problem(str(line), NOTHING, rule, fix)


def refuse_repeated(lines: Sequence[str]) -> list[Problem]:
    """Refuses `shards` that are given more than once.

    bash makes several arguments of braces outside of quotes, and Hydra would keep the last one alone.
    """
    counts = collections.Counter(line.partition("=")[0] for line in lines)
    return [
        Problem(
            "",
            NOTHING,
            f"{key} is given {count} times",
            f"put its braces in quotes, {key}='/data/{{000..099}}.tar', or give a list: '{key}=[A,B]'",
        )
        for key, count in counts.items()
        if count > 1 and key.rpartition(".")[2] == "shards"
    ]


def parse_overrides(
    lines: Sequence[str], suggest: Callable[[str], str] = lambda _: ""
) -> tuple[list[Override], list[Problem]]:
    """The overrides that can be read, and a problem for each other line; `suggest` gives a hint for a lone word."""
    parsed = [(line, parse_override(line)) for line in lines]
    problems = [
        line_problem(line, "cannot be read", _how_to_write(line))
        if "=" in line
        else line_problem(line, f"has no value{suggest(line)}", "write key=value")
        for line, override in parsed
        if override is None
    ]
    found = [override for _, override in parsed if override is not None]
    # Hydra looks for a file of the key's name, and the system refuses long names.
    long = [override for override in found if len(override.key_or_group) > _MAX_KEY]
    problems += [line_problem(each.input_line, f"no key has more than {_MAX_KEY} characters") for each in long]
    return [override for override in found if override not in long], problems


def _how_to_write(line: str) -> str:
    key = line.partition("=")[0]
    if not key.isascii():
        return "names of keys are letters from a to z, digits and _; values may be anything"
    return "write key=value, and quote special characters for both the shell and Hydra, as in 'key=\"a b\"'"


def parse_override(line: str) -> Override | None:
    """Parses one override; None if it cannot be read."""
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None


def adds(override: Override) -> bool:
    """Whether it may bring a key that is not there, as `+key` and `++key` do."""
    return override.is_add() or override.is_force_add()


def refuse_sweeps(overrides: Sequence[Override]) -> list[Problem]:
    """Problems of overrides that hold several values although one run was asked for."""
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            value = override.value()
            # Several lists or mappings are several choices; several plain values may be meant as one list.
            items = value.list if isinstance(value, ChoiceSweep) and value.simple_form else []
            plain = bool(items) and not any(isinstance(item, list | dict) for item in items)
            text, key = str(override.input_line).partition("=")[2], override.key_or_group
            hint = f"for a list write {key}=[{text}], for a text '{key}=\"{text}\"'; " if plain else ""
            problems.append(
                line_problem(override.input_line, "holds several values", f"{hint}to run them all add --multirun")
            )
    return problems


def key_problem(override: Override, base: DictConfig) -> Problem | None:
    """What is wrong with the key of an override of a value, or None; Hydra itself would name the first one only.

    Keys that are added with a plus are left to the checks of values. `base` is the configuration without the overrides
    of single keys, not in struct mode.
    """
    key, line = override.key_or_group, override.input_line
    if key == "hydra" or key.startswith("hydra."):
        return None
    node: Any = base
    above = ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            may_add = adds(override) and node is None
            return None if may_add else line_problem(line, f"{above} is a value and holds no keys")
        if part not in _names(node):
            return None if adds(override) else _unknown_key(line, part, above, node)
        node, above = _peek(node, part), f"{above}.{part}".lstrip(".")
    if override.is_add() and node is not None and not isinstance(node, DictConfig | ListConfig):
        return line_problem(line, f"{key} exists", "leave out the +")
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


def _option_problem(line: str | None, key: str, options: Sequence[object], names: Sequence[str]) -> Problem:
    """Options are chosen where a saved configuration has what they define."""
    if unknown := [str(name) for name in options if name not in names]:
        fix = f"it has no options such as {', '.join(unknown)}; compose from conf/ for them"
    elif others := [f"~{key}.{name}" for name in names if name not in options]:
        fix = f"leave others out with {' '.join(others)}"
    else:
        fix = "leave it out"
    return line_problem(line, f"{key} holds {', '.join(names)} here", fix)


def _unknown_inside(line: str | None, value: object, path: str, node: Any) -> Problem | None:
    """What is wrong with the keys of a mapping that is given as a value, or None."""
    if not isinstance(value, Mapping) or not isinstance(node, DictConfig):
        return None
    for name, item in value.items():
        if str(name) not in _names(node):
            return _unknown_key(line, str(name), path, node)
        if problem := _unknown_inside(line, item, f"{path}.{name}", _peek(node, str(name))):
            return problem
    return None


def _unknown_key(line: str | None, part: str, above: str, node: DictConfig) -> Problem:
    known = [name for name in _names(node) if not name.startswith("_") and (above or name != "hydra")]
    near, fix = nearest(part, known), f"it has {', '.join(known) or 'none'}"
    if above in _NAMED:
        fix += f"; add one of your own with a +, as in +{line}"
    elif "_target_" in node and not near:
        fix += f"; other arguments of {node['_target_']} take a +, as in +{line}"
    return line_problem(line, f"{above or 'the configuration'} has no key {part!r}{near}", fix)
