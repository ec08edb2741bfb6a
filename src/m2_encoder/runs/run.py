"""One run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, Newest, find_newest
from m2_encoder.config.model_choice import build_any_tokenizer
from m2_encoder.config.output import say
from m2_encoder.config.paths import default_run_folder, find_path, is_debug
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.sweep_jobs import EXIT_PRUNED
from m2_encoder.errors import abridge
from m2_encoder.evaluation.suite import prepare_tasks
from m2_encoder.evaluation.tasks.base import EvaluationTask
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.models.two_towers import TwoTowers
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective
from m2_encoder.runs.build import (
    Run,
    build_data,
    build_module,
    build_objectives,
    build_tasks,
    build_trainer,
    load_start,
    validation_name_of,
)
from m2_encoder.runs.callbacks import FinalWeights, build_callbacks, find_best, find_stop, take_final
from m2_encoder.runs.ending import Results, describe_end
from m2_encoder.runs.export import export_foreign, export_run, export_visual_tokenizer, trained_head
from m2_encoder.runs.folder import (
    CONFIG_FILE,
    Frozen,
    check_frozen,
    clear_debug,
    count_parameters,
    fill_in,
    read_run,
    write_config,
    write_frozen,
)
from m2_encoder.runs.length import settle_length
from m2_encoder.runs.missed_validation import MissedValidation
from m2_encoder.runs.parts import describe_foreign, gives_features, is_ours
from m2_encoder.runs.pictures import describe_other_pictures, settle_pictures
from m2_encoder.runs.pruning import find_pruning
from m2_encoder.runs.ranks import StartedRanks, end_with_starter, watching
from m2_encoder.runs.report import labels_of, report_run, short_path
from m2_encoder.runs.resume import check_resume, describe_changes, translate_load_error
from m2_encoder.runs.signals import end_on_signals
from m2_encoder.runs.sinks import begin_loggers, close_loggers
from m2_encoder.runs.start import FirstStep, check_data, describe_start, describe_temperature, write_check
from m2_encoder.runs.times import FitTimes
from m2_encoder.training.adaptation import merge_adaptation
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.first_validation import FirstValidation
from m2_encoder.training.callbacks.step_numbers import StepNumbers
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.profilers import StepProfiler, TraceProfiler
from m2_encoder.training.visual_tokenizer_module import VisualTokenizerModule

logger = logging.getLogger(__name__)

Taken: TypeAlias = tuple[nn.Module | None, Mapping[str, Objective]]
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
    debug = is_debug(cfg)
    newest = None if debug or cfg["run"]["resume"] == "never" else find_newest(folder / CHECKPOINT_FOLDER)
    resumes = newest is not None
    # Everything is checked before what costs money or leaves a trace: loggers start with the trainer.
    cfg, frozen, module, tasks, datamodule, remarks = _settle(cfg, folder, resumes=resumes)
    callbacks = build_callbacks(cfg, folder, module, tasks)
    stopped = find_stop(newest, callbacks)
    trained = cfg if newest is None else _check_newest(newest, module, cfg, folder, stopped=stopped)
    checked = check_data(datamodule, folder, resumes=resumes)
    if debug:
        clear_debug(folder)

    def write_records() -> None:
        if trained is cfg:
            write_config(folder / CONFIG_FILE, cfg)
        write_frozen(folder, frozen, resumes=resumes)
        write_check(folder, checked)

    keeps = not cfg["trainer"].get("fast_dev_run")
    first_step = FirstStep(write_records if keeps else (lambda: None))
    times, pruning = FitTimes(started), find_pruning(cfg)
    own = [first_step, FirstValidation(), MissedValidation(), times, *([] if is_ours(module) else [StepNumbers()])]
    trainer, metrics = build_trainer(cfg, folder, [*own, *pruning, *callbacks], resumes=resumes)
    ranks.trainer = trainer
    run = Run(module, datamodule, trainer, metrics)
    results: Results | None = None
    try:
        if trainer.is_global_zero:
            _announce(cfg, folder, newest, run, remarks, changes=trained is cfg, stopped=stopped)
        with watching(trainer):
            _fit(run, newest and newest.path, name=cfg["run"]["name"])
            first_step.pass_by(trainer)  # no step is left where all were done already
            final = take_final(cfg["run"].get("final", "last"), run.module, callbacks, folder)
            taken = _take_model(run.module)
        _say_profile(trainer)
        if any(each.is_over for each in pruning):
            results = Results({}, (), folder, trainer.global_step)
            _end_pruned(run, cfg)
        results = _finish(run, taken, tasks, cfg, folder, trained=trained, final=final, times=times)
    finally:
        close_loggers(trainer, results)  # last: a server may keep it waiting
    return {**{name: float(value) for name, value in trainer.callback_metrics.items()}, **results.metrics}


def _check_newest(
    newest: Newest, module: lightning.LightningModule, cfg: dict[str, Any], folder: Path, *, stopped: str
) -> dict[str, Any]:
    """Refuses a checkpoint that does not fit; the configuration of the training that it is of, or that goes on.

    Raises:
        UserError: as `check_resume`.
    """
    is_over = bool(stopped) or newest.step >= cfg["trainer"]["max_steps"]
    check_resume(module, cfg, folder, newest.path, is_over=is_over)
    if is_over and (folder / CONFIG_FILE).is_file():
        return read_run(folder / CONFIG_FILE)  # no step is left: the records stay those of the training
    return cfg


def _say_profile(trainer: lightning.Trainer) -> None:
    profiler: object = getattr(trainer, "profiler", None)
    if trainer.is_global_zero and isinstance(profiler, StepProfiler | TraceProfiler):
        say(*profiler.describe_step().splitlines())


def _end_pruned(run: Run, cfg: Mapping[str, Any]) -> NoReturn:
    """Ends a trial that its search has given up: its checkpoints stay, it is not evaluated nor exported.

    Raises:
        SystemExit: always; with a code that says so on the first rank.
    """
    if run.trainer.is_global_zero:
        step, steps = run.trainer.global_step, cfg["trainer"]["max_steps"]
        say(f"run {cfg['run']['name']}: pruned at step {step} of {steps}, as its search wants it", error=True)
    raise SystemExit(EXIT_PRUNED if run.trainer.is_global_zero else 0)


class _Settled(NamedTuple):
    """A configuration that says everything that a run will do, and what was built to know it."""

    cfg: dict[str, Any]  # with the numbers of its architecture, for `config.yaml` and for loggers
    frozen: dict[str, Frozen]  # files that may not change
    module: lightning.LightningModule  # of the run
    tasks: dict[str, EvaluationTask]  # by name
    datamodule: lightning.LightningDataModule  # of the run
    remarks: list[str]  # to be said


def _settle(cfg: dict[str, Any], folder: Path, *, resumes: bool) -> _Settled:
    cfg, remarks = settle_pictures(cfg, folder, resumes=resumes)
    given = cfg["model"]
    filled = fill_in(cfg)
    if not is_foreign(cfg["model"]):
        count = count_parameters(cfg) if cfg.get("task") is None else None
        filled["model"] = {**cfg["model"], **filled["model"], "num_parameters": count}
    cfg = filled
    frozen = check_frozen(cfg, folder, resumes=resumes)
    remarks += describe_other_pictures(cfg)
    objectives, tasks = build_objectives(cfg), build_tasks(cfg.get("evaluation"))
    prepare_tasks(tasks, find_path)  # a set that is not there is missed now, not after the training
    datamodule = build_data(cfg, objectives)
    cfg, length = settle_length(cfg, datamodule)
    module = build_module(cfg, objectives, validation_name=validation_name_of(datamodule))
    remarks += [*length, *describe_foreign(cfg, module, datamodule)]
    remarks += [] if resumes else describe_temperature(given, module)
    return _Settled(cfg, frozen, module, tasks, datamodule, remarks)


def _finish(
    run: Run,
    taken: Taken,
    tasks: Mapping[str, EvaluationTask],
    cfg: dict[str, Any],
    folder: Path,
    *,
    trained: dict[str, Any],
    final: FinalWeights,
    times: FitTimes,
) -> Results:
    """Evaluates and exports what was trained, by the configuration `trained`; empty on all ranks but the first.

    `final` says which weights were taken in place of the last ones.
    """
    model, objectives = taken
    if model is None or not run.trainer.is_global_zero:
        return Results({}, (), folder, 0)
    if cfg["trainer"].get("fast_dev_run"):
        steps = run.trainer.global_step
        say(f"run {cfg['run']['name']}: debug run: {steps} step(s) and validation went through")
        return Results({}, (), folder, steps)
    end = describe_end(run.trainer, trained["trainer"]["max_steps"], debug=is_debug(cfg))
    end = end._replace(taken=final.step, averaged=final.averaged)
    is_measured = isinstance(model, VisualTokenizer) or gives_features(model)
    results = report_run(
        tasks if is_measured else {},
        model=model,
        objectives=objectives,
        datamodule=run.datamodule,
        tokenizer=build_any_tokenizer(cfg["model"]),
        run_folder=folder,
        cfg=cfg,
        end=end,
        best=find_best(run.trainer.callbacks),  # type: ignore[attr-defined]
        times=times,
        start=_start_of(trained),
    )
    if not cfg["run"]["export"] or is_debug(cfg):
        return results
    if isinstance(model, VisualTokenizer):
        export_visual_tokenizer(folder, tokenizer=model, cfg=trained, metrics=results.metrics, end=end)
    elif isinstance(model, TwoTowers):
        written = export_foreign(folder, model=model, cfg=trained, end=end, overwrite=True)
        say(f"  use it       {short_path(written / 'README.md')} says how to load the weights")
    elif isinstance(model, M2Encoder):
        exported = export_run(
            folder, model=model, cfg=trained, end=end, matching=trained_head(objectives), overwrite=True
        )
        say(f'  use it       m2_encoder.load("{short_path(exported)}")')
    return results


def _start_of(cfg: Mapping[str, Any]) -> Callable[[], M2Encoder] | None:
    """What loads the model that a run started from; None if there was none, or it was somebody else's."""
    if is_foreign(cfg["model"]) or cfg["model"].get("weights") is None:
        return None
    return partial(load_start, cfg["model"])  # type: ignore[return-value]  # there are weights


def _take_model(module: lightning.LightningModule) -> Taken:
    """What was trained, whole, and by which objectives; where weights are split, every rank takes part."""
    if isinstance(module, VisualTokenizerModule):
        return module.tokenizer, {}
    if not isinstance(module, PretrainModule):
        return module, {}
    model = gather_model(module.model, module.build_unfilled)
    merged = None if model is None else merge_adaptation(module.adaptation, model)
    return merged, module.trained_objectives()


def _describe_newest(done: int, steps: int, stopped: str, folder: Path) -> str:
    if stopped:
        return f"ended at step {done} of {steps} by {stopped}; evaluating again"
    if done < steps:
        return f"continuing at step {done} of {steps}, in {folder}"
    return f"all {done} steps are done already; evaluating again"


def _announce(
    cfg: dict[str, Any],
    folder: Path,
    newest: Newest | None,
    run: Run,
    remarks: Sequence[str],
    *,
    changes: bool,
    stopped: str,
) -> None:
    name, steps = cfg["run"]["name"], cfg["trainer"]["max_steps"]
    done = 0 if newest is None else newest.step
    if labels := labels_of(cfg):
        words = [", ".join(value) if isinstance(value, list) else value for value in labels.values()]
        say(f"run {name}: {abridge(' · '.join(words), 300)}")
    run.metrics.resume_at(done)  # of a start that ended before it saved anything, too
    begin_loggers(run.trainer, cfg, run.metrics.path)
    if tried := cfg["trainer"].get("fast_dev_run"):
        say(f"run {name}: debug run of {int(tried)} step(s); nothing is kept")
    elif newest is None:
        say(f"run {name}: {steps} steps, everything in {folder}")
    else:
        if newest.passed:
            more = f"; and {len(newest.passed) - 1} more" if len(newest.passed) > 1 else ""
            say(f"run {name}: {newest.path.name} is the newest whole checkpoint ({newest.passed[0][:300]}{more})")
        said = _describe_newest(done, steps, stopped, folder)
        say(f"run {name}: {said}")
        if changes and (found := describe_changes(folder / CONFIG_FILE, cfg)):
            say(f"run {name}: changed since its last start: {'; '.join(found)}")
    if not any(isinstance(each, RunCheckpoint) for each in run.trainer.callbacks):  # type: ignore[attr-defined]
        say(f"run {name}: saves no checkpoint to go on from; callbacks=[default,...] has the callback that does")
    for line in remarks:
        say(f"run {name}: {line}")
    if done >= steps or stopped or not isinstance(run.module, PretrainModule):
        return  # a task has no objectives
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
        ".*You (passed in|defined) a `val.*Skipping val loop.*",  # of other people's tasks and data, which is said
        ".*LeafSpec.*is deprecated.*",  # Lightning's use of a newer torch
        r"Found \d+ module\(s\) in eval mode.*",  # locked towers are meant to be
    ):
        warnings.filterwarnings("ignore", message=remark)
