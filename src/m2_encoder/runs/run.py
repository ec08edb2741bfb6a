"""One run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

import lightning
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.config.paths import anchor, default_run_folder
from m2_encoder.data.webdataset_module import WebDatasetModule
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.runs.build import (
    build_adaptation,
    build_initial_state,
    build_masking,
    build_tasks,
    load_teachers,
    load_visual_tokenizers,
)
from m2_encoder.runs.changes import describe_changes
from m2_encoder.runs.export import export_run, export_visual_tokenizer, trained_head
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_step, write_config
from m2_encoder.runs.frozen_files import check_frozen, write_frozen
from m2_encoder.runs.lightning_loggers import JsonlLogger, QuietWandbLogger
from m2_encoder.runs.ranks import end_together
from m2_encoder.runs.report import report_run, short_path
from m2_encoder.runs.resume import check_parameters, restored_unless_trained
from m2_encoder.runs.start import check_data, describe_start, write_check
from m2_encoder.training.adaptation import merge_adaptation
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.visual_tokenizer_module import VisualTokenizerModule

logger = logging.getLogger(__name__)

METRICS_FILE: Final = "metrics.jsonl"


class Run(NamedTuple):
    """The objects of one run.

    Attributes:
        module: model, objectives, optimizer; or what `task` names in place of it.
        datamodule: training and evaluation data.
        trainer: Lightning's.
        metrics: the logger behind `metrics.jsonl`.
    """

    module: PretrainModule | VisualTokenizerModule
    datamodule: WebDatasetModule
    trainer: lightning.Trainer
    metrics: JsonlLogger


def train(cfg: dict[str, Any]) -> dict[str, float]:
    """Trains, evaluates and exports one run.

    Args:
        cfg: the resolved configuration of `m2-train`, plain containers.

    Returns:
        Final metrics by name; empty on all ranks but the first.

    Raises:
        UserError: for data, weights or a checkpoint that cannot be used.
    """
    started = time.time()
    folder = default_run_folder(cfg)
    _quieten()
    lightning.seed_everything(cfg["seed"], workers=True, verbose=False)
    checkpoint = folder / LAST_CHECKPOINT
    resumes = cfg["run"]["resume"] != "never" and checkpoint.is_file()
    frozen = check_frozen(cfg, folder, resumes=resumes)  # all checks: before what costs money, or leaves a trace
    datamodule = build_data(cfg)
    checked = check_data(datamodule, folder, resumes=resumes)
    run = build_run(cfg, folder, datamodule, checkpoint=checkpoint if resumes else None)
    with restored_unless_trained(folder, cfg, run.trainer) if resumes else contextlib.nullcontext():
        if run.trainer.is_global_zero:
            changes = describe_changes(folder / CONFIG_FILE, cfg) if resumes else []
            write_config(folder / CONFIG_FILE, cfg)
            write_frozen(folder, frozen, resumes=resumes)
            write_check(folder, checked)
            _announce(cfg, folder, checkpoint if resumes else None, run)
            if changes:
                print(f"run {cfg['run']['name']}: changed since its last start: {'; '.join(changes)}")
        _fit(run, checkpoint if resumes else None)
    model: M2Encoder | VisualTokenizer | None
    if isinstance(run.module, VisualTokenizerModule):
        model, objectives = run.module.tokenizer, {}
    else:
        adaptation = run.module.adaptation
        whole = gather_model(run.module.model, adaptation.apply)  # where weights are split, every rank takes part
        model = None if whole is None else merge_adaptation(adaptation, whole)
        objectives = run.module.trained_objectives()
    if model is None or not run.trainer.is_global_zero:
        return {}
    metrics = report_run(
        build_tasks(cfg.get("evaluation")),
        model=model,
        objectives=objectives,
        datamodule=run.datamodule,
        run_folder=folder,
        cfg=cfg,
        started=started,
    )
    _close_loggers(run, metrics)
    if not cfg["run"]["export"]:
        return metrics
    if isinstance(model, VisualTokenizer):
        export_visual_tokenizer(folder, tokenizer=model, cfg=cfg, metrics=metrics)
    else:
        exported = export_run(folder, model=model, cfg=cfg, matching=trained_head(objectives), overwrite=True)
        print(f'  use it       m2_encoder.load("{short_path(exported)}")')
    return metrics


def build_data(cfg: dict[str, Any]) -> WebDatasetModule:
    """Builds the data module of a configuration; it reads nothing yet.

    Args:
        cfg: the resolved configuration.
    """
    model = build_model_config(cfg["model"])
    data = dict(cfg["data"])
    if "folder" in data:
        data["folder"] = str(anchor(data["folder"]))
    tokenizer = build_tokenizer(cfg["model"], model)
    return instantiate(
        data,
        tokenizer=tokenizer,
        image_size=model.image_size,
        seed=cfg["seed"],
        max_steps=cfg["trainer"]["max_steps"],
        masking=build_masking(instantiate(cfg.get("objective", {})), tokenizer, model),
    )


def build_run(cfg: dict[str, Any], folder: Path, datamodule: Any = None, *, checkpoint: Path | None = None) -> Run:
    """Builds everything a run needs; nothing is read from the training data.

    Args:
        cfg: the resolved configuration.
        folder: the run's.
        datamodule: that of the run, where it is built already.
        checkpoint: that the run shall go on from; one that does not fit is refused before any logger starts.

    Raises:
        UserError: for data, weights or a checkpoint that cannot be used.
    """
    datamodule = build_data(cfg) if datamodule is None else datamodule
    module = _build_module(cfg, datamodule.validation_name)
    if checkpoint is not None:
        check_parameters(module, checkpoint, cfg=cfg, folder=folder)
    metrics = JsonlLogger(folder / METRICS_FILE)
    trainer = instantiate(
        cfg["trainer"],
        strategy=instantiate(cfg["strategy"]),
        logger=[metrics, *_build_logger(cfg, folder)],
        callbacks=_build_callbacks(cfg, folder),
        plugins=_build_plugins(cfg["cluster"]["name"]),
        default_root_dir=str(folder),
    )
    return Run(module, datamodule, trainer, metrics)


def _build_module(cfg: dict[str, Any], validation_name: str) -> PretrainModule | VisualTokenizerModule:
    model = build_model_config(cfg["model"])
    shared = {
        "optimizer": instantiate(cfg["optimizer"]),
        "scheduler": instantiate(cfg["scheduler"]),
        "validation_name": validation_name,
    }
    if cfg.get("task") is not None:
        return instantiate(cfg["task"], image_size=model.image_size, patch_size=model.patch_size, **shared)
    objectives = load_teachers(instantiate(cfg["objective"]), cfg["model"], model)
    return PretrainModule(
        model=model,
        objectives=load_visual_tokenizers(objectives, model),
        initial_state=build_initial_state(cfg["model"], model),
        adaptation=build_adaptation(cfg, model),
        **shared,
    )


def _close_loggers(run: Run, metrics: dict[str, float]) -> None:
    for sink in run.trainer.loggers:
        if isinstance(sink, QuietWandbLogger):
            sink.close(metrics)


def _build_logger(cfg: dict[str, Any], folder: Path) -> list[Logger]:
    given: dict[str, Any] = {"folder": folder}
    if cfg["logger"]["_target_"].endswith(".build_wandb_logger"):
        given |= {"run_name": cfg["run"]["name"], "cfg": cfg}
    built = instantiate(cfg["logger"], _recursive_=False, **given)  # the configuration in it is a value
    return [] if built is None else [built]


def _build_callbacks(cfg: dict[str, Any], folder: Path) -> list[lightning.Callback]:
    given = {"checkpoint": {"folder": str((folder / LAST_CHECKPOINT).parent)}}
    return [instantiate(node, **given.get(name, {})) for name, node in cfg["callbacks"].items()]


def _build_plugins(cluster: str) -> list[ClusterEnvironment]:
    """The environment that `cluster` names, so that no variable left over from elsewhere decides it."""
    if cluster == "slurm":
        return [SLURMEnvironment(auto_requeue=False)]  # submitit owns preemption
    if cluster == "torchrun" or TorchElasticEnvironment.detect():
        return [TorchElasticEnvironment()]
    return [LightningEnvironment()]


def _announce(cfg: dict[str, Any], folder: Path, checkpoint: Path | None, run: Run) -> None:
    name, steps = cfg["run"]["name"], cfg["trainer"]["max_steps"]
    if checkpoint is None:
        print(f"run {name}: {steps} steps, everything in {folder}")
    else:
        done = read_step(checkpoint)
        run.metrics.resume_at(done)
        if done >= steps:
            print(f"run {name}: all {done} steps are done already; evaluating again")
            return
        print(f"run {name}: continuing at step {done} of {steps}, in {folder}")
    if isinstance(run.module, VisualTokenizerModule):
        return  # it has no objectives
    ranks = {"world_size": run.trainer.world_size, "ranks_per_node": run.trainer.num_devices}
    for line in describe_start(cfg, run.module.trained_objectives(), **ranks):
        print(f"run {name}: {line}")
        logger.info(line)


def _fit(run: Run, checkpoint: Path | None) -> None:
    try:
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        if run.trainer.is_global_zero:
            step = run.trainer.global_step
            print(f"m2-train: ended by SIGTERM, step {step} is saved; run.resume=auto goes on", file=sys.stderr)
        raise
    except SystemExit as stop:
        if run.trainer.interrupted:
            raise KeyboardInterrupt from stop  # Lightning turns one into an exit code of its own
        raise
    except Exception as error:
        if run.trainer.world_size > 1 and (other := end_together(run.trainer, error)) is not None:
            raise other from error
        raise


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
