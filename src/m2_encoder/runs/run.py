"""One run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, Newest, find_newest
from m2_encoder.config.output import say
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.sweep_jobs import EXIT_PRUNED
from m2_encoder.errors import abridge
from m2_encoder.evaluation.tasks.base import EvaluationTask
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective
from m2_encoder.runs.build import Module, Run, build_data, build_module, build_objectives, build_tasks, build_trainer
from m2_encoder.runs.callbacks import build_callbacks, find_best, find_stop, take_best
from m2_encoder.runs.ending import describe_end
from m2_encoder.runs.export import export_run, export_visual_tokenizer, trained_head
from m2_encoder.runs.folder import CONFIG_FILE, check_frozen, read_run, write_config, write_frozen
from m2_encoder.runs.lightning_loggers import QuietWandbLogger
from m2_encoder.runs.missed_validation import MissedValidation
from m2_encoder.runs.pictures import describe_other_pictures, settle_pictures
from m2_encoder.runs.pruning import find_pruning
from m2_encoder.runs.ranks import StartedRanks, end_with_starter, watching
from m2_encoder.runs.report import labels_of, report_run, short_path
from m2_encoder.runs.resume import check_resume, describe_changes, translate_load_error
from m2_encoder.runs.signals import end_on_signals
from m2_encoder.runs.start import FirstStep, check_data, describe_start, write_check
from m2_encoder.runs.times import FitTimes
from m2_encoder.training.adaptation import merge_adaptation
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.first_validation import FirstValidation
from m2_encoder.training.visual_tokenizer_module import VisualTokenizerModule

logger = logging.getLogger(__name__)

Taken: TypeAlias = tuple[M2Encoder | VisualTokenizer | None, Mapping[str, Objective]]
"""A model and what it was trained by; no model on ranks that have none of their own."""


def train(cfg: dict[str, Any]) -> dict[str, float]:
    """Trains, evaluates and exports one run; its last metrics by name, those of the end on the first rank alone.

    Raises:
        UserError: for data, weights or a checkpoint that cannot be used.
    """
    ranks = StartedRanks()
    end_with_starter(ranks)
    with end_on_signals(ranks.end):
        return _train(cfg, ranks)


def _train(cfg: dict[str, Any], ranks: StartedRanks) -> dict[str, float]:
    started = time.time()
    _quieten()
    lightning.seed_everything(cfg["seed"], workers=True, verbose=False)
    folder = default_run_folder(cfg)
    newest = None if cfg["run"]["resume"] == "never" else find_newest(folder / CHECKPOINT_FOLDER)
    resumes = newest is not None
    cfg, remarks = settle_pictures(cfg, folder, resumes=resumes)

    # Everything is checked before what costs money or leaves a trace: loggers start with the trainer.
    frozen = check_frozen(cfg, folder, resumes=resumes)
    remarks += describe_other_pictures(cfg)
    objectives, tasks = build_objectives(cfg), build_tasks(cfg.get("evaluation"))
    datamodule = build_data(cfg, objectives)
    module = build_module(cfg, objectives, validation_name=datamodule.validation_name)
    callbacks = build_callbacks(cfg, folder, module)
    stopped = find_stop(newest, callbacks)
    trained = cfg if newest is None else _check_newest(newest, module, cfg, folder, stopped=stopped)
    checked = check_data(datamodule, folder, resumes=resumes)

    def write_records() -> None:
        if trained is cfg:
            write_config(folder / CONFIG_FILE, cfg)
        write_frozen(folder, frozen, resumes=resumes)
        write_check(folder, checked)

    first_step, times = FirstStep(write_records), FitTimes(started)
    pruning = find_pruning(cfg)
    own = [first_step, FirstValidation(), MissedValidation(), times, *pruning]
    trainer, metrics = build_trainer(cfg, folder, [*own, *callbacks])
    ranks.trainer = trainer
    run = Run(module, datamodule, trainer, metrics)
    metrics_of_end: dict[str, float] | None = None
    try:
        if trainer.is_global_zero:
            _announce(cfg, folder, newest, run, changes=trained is cfg, stopped=stopped)
            for line in remarks:
                say(f"run {cfg['run']['name']}: {line}")
        with watching(trainer):
            _fit(run, newest and newest.path, name=cfg["run"]["name"])
            first_step.pass_by(trainer)  # no step is left where all were done already
            best = take_best(run.module, callbacks, folder) if cfg["run"].get("final") == "best" else None
            taken = _take_model(run.module)
        if any(each.is_over for each in pruning):
            metrics_of_end = {}
            _end_pruned(run, cfg)
        metrics_of_end = _finish(run, taken, tasks, cfg, folder, trained=trained, best=best, times=times)
    finally:
        _close_loggers(run, metrics_of_end)  # last: a server may keep it waiting
    return {**{name: float(value) for name, value in trainer.callback_metrics.items()}, **metrics_of_end}


def _check_newest(newest: Newest, module: Module, cfg: dict[str, Any], folder: Path, *, stopped: str) -> dict[str, Any]:
    """Refuses a checkpoint that does not fit; the configuration of the training that it is of, or that goes on.

    Raises:
        UserError: as `check_resume`.
    """
    is_over = bool(stopped) or newest.step >= cfg["trainer"]["max_steps"]
    check_resume(module, cfg, folder, newest.path, is_over=is_over)
    if is_over and (folder / CONFIG_FILE).is_file():
        return read_run(folder / CONFIG_FILE)  # no step is left: the records stay those of the training
    return cfg


def _end_pruned(run: Run, cfg: Mapping[str, Any]) -> NoReturn:
    """Ends a trial that its search has given up: its checkpoints stay, it is not evaluated nor exported.

    Raises:
        SystemExit: always; with a code that says so on the first rank.
    """
    if run.trainer.is_global_zero:
        step, steps = run.trainer.global_step, cfg["trainer"]["max_steps"]
        say(f"run {cfg['run']['name']}: pruned at step {step} of {steps}: other trials were better by then", error=True)
    raise SystemExit(EXIT_PRUNED if run.trainer.is_global_zero else 0)


def _finish(
    run: Run,
    taken: Taken,
    tasks: Mapping[str, EvaluationTask],
    cfg: dict[str, Any],
    folder: Path,
    *,
    trained: dict[str, Any],
    best: int | None,
    times: FitTimes,
) -> dict[str, float]:
    """Evaluates and exports what was trained, by the configuration `trained`; the metrics, on the first rank alone.

    `best` is the step whose weights were taken in place of the last ones.
    """
    model, objectives = taken
    if model is None or not run.trainer.is_global_zero:
        return {}
    end = describe_end(run.trainer, trained["trainer"]["max_steps"])._replace(taken=best)
    metrics = report_run(
        tasks,
        model=model,
        objectives=objectives,
        datamodule=run.datamodule,
        run_folder=folder,
        cfg=cfg,
        end=end,
        best=find_best(run.trainer.callbacks),  # type: ignore[attr-defined]
        times=times,
    )
    if not cfg["run"]["export"]:
        return metrics
    if isinstance(model, VisualTokenizer):
        export_visual_tokenizer(folder, tokenizer=model, cfg=trained, metrics=metrics, end=end)
    else:
        exported = export_run(
            folder, model=model, cfg=trained, end=end, matching=trained_head(objectives), overwrite=True
        )
        say(f'  use it       m2_encoder.load("{short_path(exported)}")')
    return metrics


def _take_model(module: Module) -> Taken:
    """What was trained, whole, and by which objectives; where weights are split, every rank takes part."""
    if isinstance(module, VisualTokenizerModule):
        return module.tokenizer, {}
    model = gather_model(module.model, module.adaptation.apply)
    merged = None if model is None else merge_adaptation(module.adaptation, model)
    return merged, module.trained_objectives()


def _close_loggers(run: Run, metrics: dict[str, float] | None) -> None:
    for sink in run.trainer.loggers:
        if isinstance(sink, QuietWandbLogger):
            sink.close(metrics)


def _announce(
    cfg: dict[str, Any], folder: Path, newest: Newest | None, run: Run, *, changes: bool, stopped: str
) -> None:
    name, steps = cfg["run"]["name"], cfg["trainer"]["max_steps"]
    done = 0 if newest is None else newest.step
    if labels := labels_of(cfg):
        words = [", ".join(value) if isinstance(value, list) else value for value in labels.values()]
        say(f"run {name}: {abridge(' · '.join(words), 300)}")
    run.metrics.resume_at(done)  # of a start that ended before it saved anything, too
    if newest is None:
        say(f"run {name}: {steps} steps, everything in {folder}")
    else:
        if newest.passed:
            more = f"; and {len(newest.passed) - 1} more" if len(newest.passed) > 1 else ""
            say(f"run {name}: {newest.path.name} is the newest whole checkpoint ({newest.passed[0][:300]}{more})")
        if stopped:
            said = f"ended at step {done} of {steps} by {stopped}; evaluating again"
        elif done < steps:
            said = f"continuing at step {done} of {steps}, in {folder}"
        else:
            said = f"all {done} steps are done already; evaluating again"
        say(f"run {name}: {said}")
        if changes and (found := describe_changes(folder / CONFIG_FILE, cfg)):
            say(f"run {name}: changed since its last start: {'; '.join(found)}")
    if not any(isinstance(each, RunCheckpoint) for each in run.trainer.callbacks):  # type: ignore[attr-defined]
        say(f"run {name}: saves no checkpoint to go on from; callbacks=[default,...] has the callback that does")
    if done >= steps or stopped or isinstance(run.module, VisualTokenizerModule):
        return  # which has no objectives
    ranks = {"world_size": run.trainer.world_size, "ranks_per_node": run.trainer.num_devices}
    for line in describe_start(cfg, run.module.trained_objectives(), **ranks):
        say(f"run {name}: {line}")
        logger.info(line)


def _fit(run: Run, checkpoint: Path | None, *, name: str) -> None:
    try:
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException as end:
        if run.trainer.is_global_zero:
            step, name = run.trainer.global_step, signal.Signals(int(str(end.code)) - 128).name
            say(f"m2-train: ended by {name}, step {step} is saved; run.resume=auto goes on", error=True)
        raise
    except SystemExit as stop:
        if run.trainer.interrupted and stop.code == 1:
            raise KeyboardInterrupt from stop  # Lightning turns one into that exit code
        raise
    except Exception as error:
        cause = translate_load_error(error, name)
        if cause is None:
            raise
        raise cause from error


def _quieten() -> None:
    """Lightning's remarks about its own settings; real warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in (
        ".*does not have many workers.*",  # measured: more workers than cores slow this reader down
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*GPU available but not used.*",  # the configuration says so
        r".*self\.log\('(val/|step).*sync_dist=True.*",  # recalls are over all ranks, the step is the same on all
        ".*number of training batches .* smaller than the logging interval.*",  # of a run of a few steps
        ".*Total length of `list` across ranks is zero.*",  # no validation set was given
        ".*LeafSpec.*is deprecated.*",  # Lightning's use of a newer torch
    ):
        warnings.filterwarnings("ignore", message=remark)
