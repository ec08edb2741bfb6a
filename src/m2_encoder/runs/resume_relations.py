"""Rules between a configuration and that of the run which it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from hydra.errors import InstantiationException

from m2_encoder.config.known import Known
from m2_encoder.config.objective_relations import counting, trained_by
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.problems import show
from m2_encoder.errors import Problem, UserError
from m2_encoder.models.visual_tokenizer import VisualTokenizerConfig
from m2_encoder.runs.changes import Change, find_changes
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_config

_MUON_TARGET: Final = "m2_encoder.training.optim.build_muon"
_OF_THE_MODEL: Final = ("image_size", "patch_size")
_NEW_NAME: Final = "or give another run.name"


def find_resumed(known: Known) -> Path | None:
    """Folder of the run that is continued; None where none is."""
    if known("run.resume") == "never":
        return None
    folder = default_run_folder({"run": {"name": known("run.name"), "folder": known("run.folder")}})
    return folder if (folder / CONFIG_FILE).is_file() and (folder / LAST_CHECKPOINT).is_file() else None


def _read_resumed(known: Known) -> dict[str, Any]:
    """The configuration of that run; empty where there is none, or it is damaged, which is reported for the model."""
    try:
        return {} if (folder := find_resumed(known)) is None else read_config(folder / CONFIG_FILE)
    except UserError:
        return {}


def _check_resumed_task(known: Known) -> Iterator[Problem]:
    """A visual tokenizer keeps its sizes, of which its parameters do not show all."""
    before = _read_resumed(known).get("task")
    if not isinstance(before, Mapping) or known("task", None) is None:
        return
    for field in dataclasses.fields(VisualTokenizerConfig):
        key, name = f"task.{field.name}", field.name
        if name not in _OF_THE_MODEL and name in before and known(key, before[name]) != before[name]:
            rule = f"must be {show(before[name])}, as in the run that is continued"
            yield Problem(key, known(key), rule, f"leave it out, {_NEW_NAME}")


def _check_resumed_optimizer(known: Known) -> Iterator[Problem]:
    """Muon's state is not that of any other."""
    before, now = _read_resumed(known).get("optimizer"), known("optimizer._target_")
    was = before.get("_target_") if isinstance(before, Mapping) else None
    if was is not None and (was == _MUON_TARGET) != (now == _MUON_TARGET):
        rule = f"must be {was}, as in the run that is continued"
        yield Problem("optimizer._target_", now, rule, f"leave optimizer=... out, {_NEW_NAME}")


def _check_resumed_objectives(known: Known) -> Iterator[Problem]:
    """A checkpoint holds the parameters that its objectives train, no others."""
    saved = _read_resumed(known).get("objective")
    if not isinstance(saved, Mapping):
        return
    now = {name: known(f"objective.{name}") for name in counting(known)}
    before = {name: node for name, node in saved.items() if isinstance(node, Mapping) and node.get("weight", 1.0)}
    fits = _train_alike(before, now)
    if fits or fits is None:
        return
    found = False
    for name in now:
        if name in before and (change := _find_cause(before[name], now[name])) is not None:
            yield _name_change(f"objective.{name}.{change.key}", change)
            found = True
    if not found:
        rule = f"must train the same parameters as [{','.join(before)}], whose run is continued"
        fix = f"leave it out, {_NEW_NAME}; weights may change, but not from or to 0"
        yield Problem("objective", f"[{','.join(now)}]", rule, fix)


def _train_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool | None:
    """Whether objectives train the same; None if one cannot be made, which is reported where it is read."""
    try:
        return trained_by(before) == trained_by(now)
    except (UserError, KeyError, TypeError, AttributeError, InstantiationException):
        return None


def _find_cause(before: Mapping[str, Any], now: Mapping[str, Any]) -> Change | None:
    """The first argument without whose change an objective would train something else than it does now."""
    if _train_alike({"": before}, {"": now}):
        return None
    changes = find_changes(before, now)
    deciding = (change for change in changes if not _train_alike({"": now}, {"": _undo(now, change)}))
    return next(deciding, changes[0] if changes else None)


def _undo(node: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """A copy of a node with one argument as it was; one that was not given is null or left out."""
    head, _, rest = change.key.partition(".")
    undone = dict(node)
    if rest:
        inner = undone.get(head)
        undone[head] = _undo(inner if isinstance(inner, Mapping) else {}, change._replace(key=rest))
    elif change.before is None and change.now is not None:
        undone.pop(head)
    else:
        undone[head] = change.before
    return undone


def _name_change(key: str, change: Change) -> Problem:
    if change.before is None:
        rule, fix = "was not given in the run that is continued", "leave it out"
    else:
        rule = f"must be {show(change.before)}, as in the run that is continued"
        fix = "choose the objective it began with" if key.endswith("_target_") else f"use {key}={show(change.before)}"
    return Problem(key, change.now, rule, f"{fix}, {_NEW_NAME}")


RESUME_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (
    _check_resumed_task,
    _check_resumed_optimizer,
    _check_resumed_objectives,
)
