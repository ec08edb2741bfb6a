"""The callbacks of a run: built, and asked what a checkpoint says of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from m2_encoder.checkpoints.digests import check_zip
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, Newest, read_average, read_content, read_step
from m2_encoder.config.check import read_parameters
from m2_encoder.config.model_choice import build_any_tokenizer
from m2_encoder.errors import CheckpointError, under
from m2_encoder.evaluation.tasks.base import EvaluationTask
from m2_encoder.pictures import STANDARD, read_policy
from m2_encoder.runs.folder import LAST_CHECKPOINT
from m2_encoder.runs.sinks import check_kind
from m2_encoder.training.callbacks.average import find_average
from m2_encoder.training.callbacks.checkpoint import BEST_NAME
from m2_encoder.training.callbacks.monitors import BestCheckpoint, Monitoring, StopEarly, unknown_metric
from m2_encoder.training.callbacks.suites import MeasureSuites

_KNOWN_MODULES = ("m2_encoder.", "lightning.")


def build_callbacks(
    cfg: Mapping[str, Any],
    folder: Path,
    module: lightning.LightningModule,
    tasks: Mapping[str, EvaluationTask] | None = None,
) -> list[lightning.Callback]:
    """The callbacks of a configuration, in its order; `tasks` are its evaluations.

    Raises:
        UserError: for something else, and for a metric of validation that is watched and that nothing logs.
    """
    made: dict[str, Any] = {}
    for name, node in cfg["callbacks"].items():
        given: dict[str, Any] = {}
        if name == "checkpoint":
            takes = read_parameters(pkgutil.resolve_name(node["_target_"]))
            values = {"folder": str((folder / LAST_CHECKPOINT).parent)}
            values |= {key: cfg["run"].get(key) for key in ("keep_last", "keep_every")}
            given = {key: value for key, value in values.items() if key in takes and value is not None}
        made[name] = instantiate(node, **given)
        if isinstance(made[name], Monitoring):
            made[name].key = f"callbacks.{name}"
            made[name].resolve(module)
        if isinstance(made[name], MeasureSuites):
            pictures = read_policy(cfg["model"].get("pictures") or STANDARD)
            tokenizer = build_any_tokenizer(cfg["model"])
            style = str(cfg["data"].get("heldout_style") or "")
            with under(f"callbacks.{name}"):
                made[name].attach(tasks or {}, tokenizer=tokenizer, pictures=pictures, heldout_style=style)
    check_kind("callbacks", cfg["callbacks"], made, lightning.Callback)
    _check_monitors(made, module)
    switches = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
    unwanted = tuple(kind for key, kind in switches.items() if cfg["trainer"].get(key) is False)
    return [callback for callback in made.values() if not isinstance(callback, unwanted)]


def _check_monitors(callbacks: Mapping[str, Any], module: lightning.LightningModule) -> None:
    """Refuses a metric of validation that is not among the module's, where no callback of others could log it.

    A metric of training is looked for after the first step, all others at the first validation.

    Raises:
        UserError: naming it, and those that there are.
    """
    find = getattr(module, "validation_metrics", None)
    if find is None or not all(type(each).__module__.startswith(_KNOWN_MODULES) for each in callbacks.values()):
        return
    known = find()
    for name, each in callbacks.items():
        if isinstance(each, Monitoring | EarlyStopping | ModelCheckpoint):
            monitor = each.monitor
            if monitor is not None and monitor.startswith("val/") and monitor not in known:
                raise unknown_metric(f"callbacks.{name}", monitor, known)


def find_stop(newest: Newest | None, callbacks: Sequence[lightning.Callback]) -> str:
    """Why one of the callbacks has ended the run before, by its newest checkpoint; empty if none has.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    stoppers = [each for each in callbacks if isinstance(each, StopEarly)]
    if newest is None or not stoppers:
        return ""
    states = read_content(newest.path).get("callbacks") or {}
    return next(filter(None, (each.stopped_in(states) for each in stoppers)), "")


def find_best(callbacks: Iterable[Any]) -> BestCheckpoint | None:
    """The callback that has chosen the best checkpoint, if there is one and it has."""
    return next((each for each in callbacks if isinstance(each, BestCheckpoint) and each.value is not None), None)


class FinalWeights(NamedTuple):
    """Which weights a run is evaluated and exported with, if not those that it ended with."""

    step: int | None = None  # the best one
    averaged: bool = False  # whether they are the moving average of that step, or of the last one


def take_final(
    final: str, module: lightning.LightningModule, callbacks: Sequence[lightning.Callback], folder: Path
) -> FinalWeights:
    """Gives a trained module the weights that `run.final` names; every rank calls it, also where weights are split.

    Raises:
        CheckpointError: as `take_best`.
    """
    average = find_average(callbacks)
    if final == "ema" and average is not None:
        average.take(module)
        return FinalWeights(averaged=True)
    return take_best(module, callbacks, folder) if final == "best" else FinalWeights()


def take_best(module: lightning.LightningModule, callbacks: Sequence[lightning.Callback], folder: Path) -> FinalWeights:
    """Gives a trained module the weights of the best checkpoint; nothing where no validation chose one.

    They are the moving average where that was validated. Every rank calls it, also where weights are split.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another step.
    """
    best = find_best(callbacks)
    if best is None:
        return FinalWeights()
    path = folder / CHECKPOINT_FOLDER / BEST_NAME
    if not path.is_file() or read_step(path) != best.step:
        rule = f"is {'missing' if not path.is_file() else 'another one'}, and the best step was {best.step}"
        raise CheckpointError(f"{path}: {rule}; use run.final=last")
    check_zip(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    average = read_average(path, final="best")
    state = {**content["state_dict"], **average}
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
    return FinalWeights(best.step, bool(average))
