"""Rules of objectives: among each other, with the data, and with the files that they read."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from m2_encoder.config.foreign_model import towers_config
from m2_encoder.config.foreign_relations import needs_more
from m2_encoder.config.known import Known, count_ranks
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.config.problems import find_problems, show
from m2_encoder.config.schema import MODEL_FIELDS
from m2_encoder.config.targets import find_target
from m2_encoder.distributed.topology import resolve_group_size
from m2_encoder.errors import NotGivenError, Problem, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import Objective, active
from m2_encoder.objectives.long_captions import LongCaptions
from m2_encoder.objectives.patch_targets import PatchTargets
from m2_encoder.objectives.schedule import check_schedule, find_pause

_ANY_WIDTH: Final = 8
"""Of features of somebody else's model, which is not built yet."""


def _active(known: Known) -> list[str]:
    """Names of the objectives with a weight; the others are no part of a run, whatever they say."""
    return list(active({name: {"weight": known(f"objective.{name}.weight", 1.0)} for name in known("objective")}))


def check_kinds(known: Known) -> Iterator[Problem]:
    """Targets that are classes are subclasses of `Objective` without abstract methods."""
    for name in known("objective"):
        target = known(key := f"objective.{name}._target_", None)
        found = None if target is None else find_target(target)  # signatures have been checked
        if not inspect.isclass(found):
            continue  # a function may make one
        if not issubclass(found, Objective):
            fix = "name a subclass of m2_encoder.objectives.base.Objective"
            yield Problem(key, target, "is no objective", fix)
        elif inspect.isabstract(found):
            lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            yield Problem(key, target, f"is not complete: it does not define {lacks}", "define it, or name another")


def check_weights(known: Known) -> Iterator[Problem]:
    """Some objective has a weight."""
    objectives = known("objective")
    if objectives and not _active(known):
        names = ", ".join(objectives)
        fix = f"for example objective.{next(iter(objectives))}.weight=1.0"
        yield Problem("objective.*.weight", 0, f"must be above 0 for at least one of {names}", fix)


def check_schedules(known: Known) -> Iterator[Problem]:
    """Some objective must count at every step."""
    schedules = {name: known(f"objective.{name}.schedule", None) for name in _active(known)}
    try:
        pause = find_pause(None if schedule is None else check_schedule(schedule) for schedule in schedules.values())
    except UserError:
        return  # which its objective's constructor says
    if schedules and pause is not None and pause < known("trainer.max_steps"):
        name, schedule = next(iter(schedules.items()))
        rule = f"must not be 0 at step {pause}, where no other objective counts, either"
        fix = f"give a factor above 0 there, or objective.{name}.schedule=null"
        yield Problem(f"objective.{name}.schedule", schedule, rule, fix)


def check_shared_passes(known: Known) -> Iterator[Problem]:
    """Objectives that share a pass must want the same of it."""
    for key, targets in (("mask_ratio", "masked words or patches"), ("text_expert", "the pass of image and text")):
        by_target: dict[str, tuple[str, Any]] = {}
        for name in _active(known):
            value = known(f"objective.{name}.{key}", None)
            kind = str(known(f"objective.{name}._target_", name)) if key == "mask_ratio" else ""
            if value is None:
                continue
            first, wanted = by_target.setdefault(kind, (name, value))
            if value != wanted:
                rule = f"must be that of objective.{first}, {show(wanted)}: they share {targets}"
                fix = f"use objective.{name}.{key}={show(wanted)}"
                yield Problem(f"objective.{name}.{key}", value, rule, fix)


def check_captions(known: Known) -> Iterator[Problem]:
    """Objectives that compare the captions of an image need several of them, or a short one beside each."""
    targets = {name: str(known(f"objective.{name}._target_", "")) for name in _active(known)}
    pairs = [name for name, target in targets.items() if target.endswith(".LongCaptions")]
    key = "data.captions.short"
    if pairs and known.has("data.captions") and known(key, "wrong, as reported" if known.has(key) else None) is None:
        rule = f"must be given: objective.{pairs[0]} compares an image with a long and a short caption"
        fix = "use data.captions.short=first_sentence, or the role of the short ones, such as name"
        yield Problem(key, None, rule, fix)
    if known("data.captions.every_language", True):
        return
    for name, target in targets.items():
        key = f"objective.{name}.teacher_language"
        if known(key, None) is not None:
            rule = "needs captions in every language (data.captions.every_language=false)"
            yield Problem(key, known(key), rule, "use data.captions.every_language=true, or null")
        elif target.endswith(".TextContrast"):
            rule = f"must be true: objective.{name} compares the captions of an image"
            yield Problem("data.captions.every_language", False, rule, "use data.captions.every_language=true")


def check_routing(known: Known) -> Iterator[Problem]:
    """Routers belong to mixtures."""
    mixes = known("model.mixture_copies", None) or str(known("adaptation._target_", "")).endswith(".Upcycling")
    for name in _active(known):
        if str(target := known(f"objective.{name}._target_", "")).endswith(".BalancedRouting") and not mixes:
            fix = "use adaptation=mixture, or leave it out of objective"
            yield Problem(f"objective.{name}._target_", target, "needs a model with mixtures", fix)


def check_components(known: Known) -> Iterator[Problem]:
    """Principal directions are fewer than those that the images of a group have."""
    for name in _active(known):
        if not str(known(f"objective.{name}._target_", "")).endswith(".LongCaptions"):
            continue
        components, ranks = known(f"objective.{name}.components", LongCaptions().components), count_ranks(known)
        group = resolve_group_size(
            world_size=ranks,
            ranks_per_node=ranks // known("trainer.num_nodes"),
            group_size=known("strategy.group_size", None),
            group_nodes=known("strategy.group_nodes", None),
        )
        rows = known("data.global_batch_size") * group // ranks
        if components >= rows - 1:
            rule = f"must be below {rows - 1}: the {rows} images of a contrastive group have no more directions"
            fix = f"for example objective.{name}.components={max(1, rows // 4)}, or more images"
            yield Problem(f"objective.{name}.components", components, rule, fix)


def build_objectives(known: Known) -> Iterator[Problem]:
    """Each is built once on `meta`, so that its constructor's errors are reported before anything starts."""
    foreign = str(known("model._target_")) if known.has("model._target_") else None
    shape: Any
    if foreign is not None:
        model = {**known("model"), "image_size": known("model.image_size")}
        shape = dataclasses.replace(towers_config(model), feature_dim=_ANY_WIDTH)
    else:
        names = [*MODEL_FIELDS, "stretch_positions"]
        fields = {name: known(f"model.{name}") for name in names if known.has(f"model.{name}")}
        shape = build_model_config({"name": known("model.name"), **fields})
    for key in (key for name in _active(known) if known.is_complete(key := f"objective.{name}")):
        node = known(key)
        targets = node.get("targets")
        try:
            if isinstance(targets, Mapping) and not isinstance(_make(targets), PatchTargets):
                fix = "name a subclass of m2_encoder.objectives.patch_targets.PatchTargets"
                yield Problem(f"{key}.targets._target_", targets["_target_"], "makes no targets of patches", fix)
            elif foreign and isinstance(made := _make(node), Objective) and (more := needs_more(key, made, foreign)):
                yield more
            elif not isinstance(_make(node, shape), Objective):
                fix = "name a subclass of m2_encoder.objectives.base.Objective"
                yield Problem(f"{key}._target_", node["_target_"], "makes no objective", fix)
        except UserError as error:
            yield from find_problems(error.under(key))


def _make(node: Mapping[str, Any], shape: M2EncoderConfig | None = None) -> Any:
    """What a node makes, built for a model if it is an objective.

    Tensors on the meta device take no memory, but cannot be looked into: code that does is tried on the CPU.

    Raises:
        UserError: as the constructor and `build`.
    """
    with torch.random.fork_rng(devices=[]):
        with contextlib.suppress(Exception), torch.device("meta"):
            return _make_here(node, shape)
        return _make_here(node, shape)


def _make_here(node: Mapping[str, Any], shape: M2EncoderConfig | None) -> Any:
    try:
        made = instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
    if isinstance(made, Objective) and shape is not None:
        # What needs a teacher or a tokenizer gets it, and is checked with it, when the run is built.
        with contextlib.suppress(NotGivenError):
            made.build(shape)
    return made
