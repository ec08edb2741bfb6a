"""Rules of objectives: among each other, with the data, and with the files that they read."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Final

from m2_encoder.config.known import Known
from m2_encoder.config.objective_files import check_files
from m2_encoder.config.problems import show
from m2_encoder.errors import Problem
from m2_encoder.objectives.base import Objective, active
from m2_encoder.objectives.schedule import check_schedule, find_pause


def counting(known: Known) -> list[str]:
    """Names of the objectives with a weight; the others are no part of a run, whatever they say."""
    return list(active({name: {"weight": known(f"objective.{name}.weight", 1.0)} for name in known("objective")}))


def _check_kinds(known: Known) -> Iterator[Problem]:
    for name in known("objective"):
        target = known(key := f"objective.{name}._target_", None)
        found = None if target is None else pkgutil.resolve_name(target)  # signatures have been checked
        if not inspect.isclass(found):
            continue  # a function may make one
        if not issubclass(found, Objective):
            fix = "name a subclass of m2_encoder.objectives.base.Objective"
            yield Problem(key, target, "is no objective", fix)
        elif inspect.isabstract(found):
            lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            yield Problem(key, target, f"is not complete: it does not define {lacks}", "define it, or name another")


def _check_weights(known: Known) -> Iterator[Problem]:
    objectives = known("objective")
    if objectives and not counting(known):
        names = ", ".join(objectives)
        fix = f"for example objective.{next(iter(objectives))}.weight=1.0"
        yield Problem("objective.*.weight", 0, f"must be above 0 for at least one of {names}", fix)


def _check_schedules(known: Known) -> Iterator[Problem]:
    """Some objective must count at every step."""
    schedules = {name: known(f"objective.{name}.schedule", None) for name in counting(known)}
    pause = find_pause(None if schedule is None else check_schedule(schedule) for schedule in schedules.values())
    if schedules and pause is not None and pause < known("trainer.max_steps"):
        name, schedule = next(iter(schedules.items()))
        rule = f"must not be 0 at step {pause}, where no other objective counts, either"
        fix = f"give a factor above 0 there, or objective.{name}.schedule=null"
        yield Problem(f"objective.{name}.schedule", schedule, rule, fix)


def _check_shared_passes(known: Known) -> Iterator[Problem]:
    """Objectives that share a pass must want the same of it."""
    for key, targets in (("mask_ratio", "masked words or patches"), ("text_expert", "the pass of image and text")):
        by_target: dict[str, tuple[str, Any]] = {}
        for name in counting(known):
            value = known(f"objective.{name}.{key}", None)
            kind = str(known(f"objective.{name}._target_", name)) if key == "mask_ratio" else ""
            if value is None:
                continue
            first, wanted = by_target.setdefault(kind, (name, value))
            if value != wanted:
                rule = f"must be that of objective.{first}, {show(wanted)}: they share {targets}"
                fix = f"use objective.{name}.{key}={show(wanted)}"
                yield Problem(f"objective.{name}.{key}", value, rule, fix)


def _check_captions(known: Known) -> Iterator[Problem]:
    """Objectives that compare the captions of an image need several of them."""
    if known("data.captions.every_language", True):
        return
    for name in counting(known):
        target = str(known(f"objective.{name}._target_", ""))
        key = f"objective.{name}.teacher_language"
        if known(key, None) is not None:
            rule = "needs captions in every language (data.captions.every_language=false)"
            yield Problem(key, known(key), rule, "use data.captions.every_language=true, or null")
        elif target.endswith(".TextContrast"):
            rule = f"must be true: objective.{name} compares the captions of an image"
            yield Problem("data.captions.every_language", False, rule, "use data.captions.every_language=true")


def _check_one_sided(known: Known) -> Iterator[Problem]:
    for name in known("objective"):
        if known(f"objective.{name}.one_sided", False) and not known(f"objective.{name}.equal_rows", True):
            rule = f"must be false where ranks may differ in rows (objective.{name}.equal_rows=false)"
            yield Problem(f"objective.{name}.one_sided", True, rule, f"use objective.{name}.equal_rows=true")


OBJECTIVE_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (
    _check_kinds,
    _check_weights,
    _check_schedules,
    _check_shared_passes,
    _check_captions,
    _check_one_sided,
)

OBJECTIVE_PLACE_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (check_files,)
"""Those that look at this machine."""
