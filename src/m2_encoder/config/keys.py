"""What is wrong with the key of an override, seen beside the configuration that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from m2_encoder.config.overrides import adds
from m2_encoder.config.problems import nearest


def key_problem(override: Override, base: DictConfig) -> str | None:
    """What is wrong with the key of a value override, or None.

    Args:
        override: not of a group.
        base: the configuration without the overrides of single keys, not in struct mode.
    """
    key = override.key_or_group
    line = override.input_line
    if key == "hydra" or key.startswith("hydra."):
        return None
    node: Any = base
    parts = key.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if not isinstance(node, DictConfig):
            return None if adds(override) and node is None else f"{line}: {above} is a value and holds no keys"
        if part not in _names(node):
            return None if adds(override) else _unknown_key(override, part, above, node)
        node = node._get_node(part) if OmegaConf.is_interpolation(node, part) else _peek(node, part)
    if override.is_add() and node is not None and not isinstance(node, DictConfig | ListConfig):
        return f"{line}: {key} exists; leave out the +"
    if adds(override) or override.is_delete():
        return None
    return _choice_problem(override, node) or _unknown_inside(override, override.value(), key, node)


def _names(node: DictConfig) -> list[str]:
    return [str(name) for name in node]  # `in` denies keys that are ???


def _choice_problem(override: Override, node: Any) -> str | None:
    """A list of names for a mapping: options are meant, but a saved configuration has none."""
    key, value = override.key_or_group, override.value()
    is_choice = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if not is_choice or "." in key or not isinstance(node, DictConfig):
        return None
    assert isinstance(value, list)
    names = _names(node)
    if unknown := [name for name in value if name not in names]:
        fix = f"it has no options such as {', '.join(unknown)}; compose from conf/ for them"
    elif others := [f"~{key}.{name}" for name in names if name not in value]:
        fix = f"leave others out with {' '.join(others)}"
    else:
        fix = "leave it out"
    return f"{override.input_line}: {key} holds {', '.join(names)} here; {fix}"


def _unknown_inside(override: Override, value: Any, path: str, node: Any) -> str | None:
    """What is wrong with the keys of a mapping that is given as a value, or None."""
    if not isinstance(value, Mapping) or not isinstance(node, DictConfig):
        return None
    for name, item in value.items():
        if str(name) not in _names(node):
            return _unknown_key(override, str(name), path, node)
        if reason := _unknown_inside(override, item, f"{path}.{name}", _peek(node, str(name))):
            return reason
    return None


def _peek(node: DictConfig, part: str) -> Any:
    name = next(name for name in node if str(name) == part)
    return None if OmegaConf.is_missing(node, name) else node[name]


def _unknown_key(override: Override, part: str, above: str, node: DictConfig) -> str:
    known = [name for name in _names(node) if not name.startswith("_") and (above or name != "hydra")]
    near, line = nearest(part, known), override.input_line
    where = above or "the configuration"
    hint = ""
    if "_target_" in node and not near:
        target = str(node["_target_"])
        hint = f"; other arguments of {target} take a +, as in +{line}"
    return f"{line}: {where} has no key {part!r}{near}; it has {', '.join(known) or 'none'}{hint}"
