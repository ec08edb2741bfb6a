"""Rules between other people's parts (a task, a model, a scheduler) and the rest of a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Final

from m2_encoder.config.known import Known, count_ranks
from m2_encoder.config.problems import show
from m2_encoder.config.targets import find_target
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.objectives.base import LocalObjective, Objective, PairObjective

_PACKAGE: Final = "m2_encoder."
_FULL_TARGET: Final = "m2_encoder.training.adaptation.Full"
_OWN_ADAPTATIONS: Final = "m2_encoder.training.adaptations."
_FSDP: Final = "GroupedFSDPStrategy"
_NEUTRAL: Final = (("micro_batches", 1), ("activation_checkpointing", False))
_FEATURES: Final = frozenset({"features", "vision_expert_reader"})
"""Parts that an objective of features alone trains."""


def check_task(known: Known) -> Iterator[Problem]:
    """What a task would not use, or could not run with."""
    target = str(known("task._target_"))
    if known("objective", {}):
        given = list(known("objective"))
        yield Problem("objective", given, "must be empty: the task has a loss of its own", "use objective=[]")
    if target.startswith(_PACKAGE):
        return
    called = find_target(target)
    for key, neutral in _NEUTRAL:
        is_read = key == "micro_batches" and getattr(called, "reads_micro_batches", False)
        if not is_read and (value := known(f"strategy.{key}", neutral)) != neutral:
            rule = f"would change nothing: {target} has a step of its own"
            yield Problem(f"strategy.{key}", value, rule, f"use strategy.{key}={show(neutral)}")
    if (adaptation := known("adaptation._target_", _FULL_TARGET)) != _FULL_TARGET:
        yield Problem("adaptation._target_", adaptation, f"would change nothing in {target}", "use adaptation=full")
    if (weights := known("model.weights", None)) is not None:
        fix = "use model.weights=null, and load them in the task"
        yield Problem("model.weights", weights, f"would change nothing in {target}", fix)
    if not inspect.isclass(called):
        return  # a function may make one
    # By its name: whoever has it has imported Lightning, which takes seconds.
    base = next((each for each in called.__mro__ if each.__name__ == "LightningModule"), None)
    if base is None or not base.__module__.startswith("lightning."):
        fix = "derive it from lightning.LightningModule, or leave task out to train an encoder"
        rule = "is no LightningModule" if base is None else f"is one of {base.__module__.partition('.')[0]}"
        yield Problem("task._target_", target, rule, fix)
        return
    if _is_sharded(known) and getattr(called, "configure_model", None) is getattr(base, "configure_model", None):
        rule = "splits weights over ranks, which a task has to do itself in configure_model"
        yield Problem("strategy", _FSDP, rule, "use strategy=ddp, or define it")


def check_towers(known: Known) -> Iterator[Problem]:
    """What somebody else's model cannot do: everything that needs more than features."""
    if not known.has("model._target_"):
        return
    if known("strategy.activation_checkpointing", False):
        rule = f"must be false: the layers of {known('model._target_')} are not known"
        yield Problem("strategy.activation_checkpointing", True, rule, "use checkpoints inside of the model")
    for key, part in (("map_tokenizer", "token table"), ("stretch_positions", "position table")):
        if known(f"model.{key}", None) is not None:
            rule = f"must be null: the {part} of {known('model._target_')} is not known"
            yield Problem(f"model.{key}", known(f"model.{key}"), rule, f"use model.{key}=null")
    if str(adaptation := known("adaptation._target_", _FULL_TARGET)).startswith(_OWN_ADAPTATIONS):
        rule = f"needs the layers of an M2-Encoder; those of {known('model._target_')} are not known"
        yield Problem("adaptation._target_", adaptation, rule, "use adaptation=full, or one of your own")


def needs_more(key: str, objective: Objective, model: str) -> Problem | None:
    """Why an objective cannot train somebody else's model, or None if it needs features alone."""
    fix = "use objectives of features, such as objective=[itc]"
    if isinstance(objective, LocalObjective):
        return Problem(key, NOTHING, f"predicts from hidden states; {model} gives features alone", fix)
    if isinstance(objective, PairObjective):
        return Problem(key, NOTHING, f"needs image and text encoded together; {model} gives features alone", fix)
    if parts := objective.trained_parts() - _FEATURES:
        rule = f"trains {', '.join(sorted(parts))}, which {model} has not"
        return Problem(key, NOTHING, rule, "use one pair of features, such as heads=[features]")
    return None


def check_scheduler(known: Known) -> Iterator[Problem]:
    """Schedules that follow a metric: steps decide here."""
    target = str(known("scheduler._target_", ""))
    if target.endswith(".ReduceLROnPlateau"):
        fix = "use one that follows steps, such as scheduler=cosine or torch.optim.lr_scheduler.CosineAnnealingLR"
        yield Problem("scheduler._target_", target, "follows a metric; the learning rate follows steps here", fix)


def _is_sharded(known: Known) -> bool:
    return str(known("strategy._target_", "")).endswith(_FSDP) and count_ranks(known) > 0
