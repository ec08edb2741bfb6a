"""From a checked configuration to the objects of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import lightning
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, Profiler

from m2_encoder.checkpoints.visual_tokenizer import load_visual_tokenizer
from m2_encoder.checkpoints.vocabulary import pack_tokenizer
from m2_encoder.config.check import read_parameters
from m2_encoder.config.emoji_folder import EMOJI_TARGET, find_emoji_folder
from m2_encoder.config.metric_names import WEBDATASET_TARGET
from m2_encoder.config.model_choice import (
    build_any_tokenizer,
    build_model_config,
    build_towers,
    is_model_name,
    model_shape,
)
from m2_encoder.config.paths import anchor, find_path, find_pattern, find_patterns
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.data.masking.batch_masking import build_masking
from m2_encoder.data.samples.caption_ids import CaptionIds
from m2_encoder.errors import UserError, under
from m2_encoder.evaluation.tasks.base import EvaluationTask
from m2_encoder.evaluation.tasks.masked import Masked
from m2_encoder.evaluation.tasks.masked_picture import MaskedPicture
from m2_encoder.evaluation.tasks.reconstruction import Reconstruction
from m2_encoder.evaluation.tasks.retrieval import Retrieval
from m2_encoder.exports.base import ExportFormat
from m2_encoder.hub import load
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.two_towers import TowersConfig, TwoTowers
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective, active
from m2_encoder.objectives.files import START, LoadedEncoder, Resources
from m2_encoder.pictures import STANDARD, read_policy
from m2_encoder.runs.callbacks import build_callbacks
from m2_encoder.runs.folder import UNSAID
from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.runs.parts import build_optimizer_factory, build_task, choose_taken
from m2_encoder.runs.sinks import build_loggers, check_kind
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.adaptation import Adaptation, check_adaptation
from m2_encoder.training.callbacks.overfit import OverfitVerdict
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.profilers import StepProfiler, TraceProfiler

METRICS_FILE: Final = "metrics.jsonl"


class Run(NamedTuple):
    """The objects of one run."""

    module: lightning.LightningModule  # model, objectives, optimizer
    datamodule: lightning.LightningDataModule  # training and evaluation data
    trainer: lightning.Trainer  # Lightning's
    metrics: JsonlLogger  # the logger behind `metrics.jsonl`


def build_run(cfg: dict[str, Any], folder: Path) -> Run:
    """Builds everything that a run needs; nothing is read from the training data.

    Raises:
        UserError: for weights or files of objectives that cannot be used.
    """
    objectives = build_objectives(cfg)
    datamodule = build_data(cfg, objectives)
    module = build_module(cfg, objectives, validation_name=validation_name_of(datamodule))
    trainer, metrics = build_trainer(cfg, folder, build_callbacks(cfg, folder, module))
    return Run(module, datamodule, trainer, metrics)


def build_objectives(cfg: Mapping[str, Any]) -> dict[str, Objective]:
    """The active objectives, with what they read; a configuration with a `task` has none.

    Raises:
        UserError: for a file that cannot be used; it names the setting.
    """
    objectives: dict[str, Objective] = active(instantiate(cfg.get("objective") or {}))
    if not objectives:
        return {}
    config: Any = model_shape(cfg["model"])
    tokenizer: Any = build_any_tokenizer(cfg["model"])
    resources = Resources(
        tokenizer, config, find_path, partial(_load_encoder, cfg["model"], tokenizer), _load_visual_tokenizer
    )
    for name, objective in objectives.items():
        _prepare(name, objective, resources)
    return objectives


def _prepare(name: str, objective: Objective, resources: Resources) -> None:
    try:
        objective.prepare(resources)
    except UserError as error:
        raise error.under(f"objective.{name}") from error


def _load_encoder(
    model: Mapping[str, Any], tokenizer: Any, argument: str, name: str, weights: str | None
) -> LoadedEncoder:
    if name == START and is_foreign(model):
        rule = "is somebody else's model, which cannot teach; give a folder that m2-export wrote"
        raise UserError(rule, key=argument, value=name)
    if name == START and (start := load_start(model)) is not None:
        return LoadedEncoder(start, None)
    named = is_model_name(name)
    own = tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else None
    try:
        loaded = load(
            name if named else find_path(name),
            weights=None if weights is None else find_path(weights),
            tokenizer=own.model_bytes if named and own is not None else None,
        )
        read = loaded.require_tokenizer()
    except UserError as error:
        raise UserError(str(error), key=argument, value=name) from error
    # One of shorter texts would read positions that it was never trained with, or has not.
    alike = own is not None and own.model_bytes == read.model_bytes and own.context_length <= read.context_length
    return LoadedEncoder(loaded.model, None if alike else read)


def _load_visual_tokenizer(argument: str, name: str) -> VisualTokenizer:
    try:
        return load_visual_tokenizer(find_path(name))
    except UserError as error:
        raise UserError(str(error), key=argument, value=name) from error


def build_data(cfg: Mapping[str, Any], objectives: Mapping[str, Objective]) -> lightning.LightningDataModule:
    """Builds the data module of a configuration, which reads nothing yet; objectives say what is hidden of a batch."""
    model = model_shape(cfg["model"])
    data = dict(cfg["data"])
    if data.get("folder") is not None:
        data["folder"] = str(anchor(data["folder"]))
    elif data["_target_"] == EMOJI_TARGET:
        data["folder"] = str(find_emoji_folder(None, {"heldout_style": data["heldout_style"]}))
    _find_shards(data)
    _add_readers(data, objectives)
    tokenizer = build_any_tokenizer(cfg["model"])
    pictures = read_policy(cfg["model"].get("pictures") or STANDARD)
    if "pictures" in read_parameters(find_target(data["_target_"])):
        data["pictures"] = pictures.to_setting()  # Hydra would make a mapping of the policy
    elif pictures != STANDARD:
        rule = f"does not take `pictures`, so it cannot obey model.pictures={pictures.to_setting()}; let it take that"
        raise UserError(rule, key="data._target_", value=data["_target_"])
    masking = build_masking(objectives, cast("Any", tokenizer), cast("Any", model))
    values = {"tokenizer": tokenizer, "image_size": model.image_size, "seed": cfg["seed"]}
    values |= {"max_steps": cfg["trainer"]["max_steps"], "masking": masking}
    taken = choose_taken(data["_target_"], values, node=data)
    if masking is not None and "masking" not in taken:
        rule = "does not take `masking`, and an objective predicts hidden words or patches; let it take that"
        raise UserError(rule, key="data._target_", value=data["_target_"])
    made = instantiate(data, **taken)
    if not isinstance(made, lightning.LightningDataModule):
        rule = f"makes {type(made).__name__}, which is no LightningDataModule"
        raise UserError(rule, key="data._target_", value=data["_target_"])
    return made


def _find_shards(data: dict[str, Any]) -> None:
    """Let shards and validation sets be where the other commands read and write them: see `find_pattern`."""
    if data["_target_"] == WEBDATASET_TARGET:  # others say themselves what a path is
        sources = {name: {**each, "shards": find_patterns(each["shards"])} for name, each in data["sources"].items()}
        held_out = {name: find_pattern(path) for name, path in (data.get("validation") or {}).items()}
        data |= {"sources": sources, "validation": held_out}


def _add_readers(data: dict[str, Any], objectives: Mapping[str, Objective]) -> None:
    """Let batches have the ids that objectives read by tokenizers of their own."""
    readers = {name: reader for each in objectives.values() for name, reader in each.readers.items()}
    if readers and "columns" not in read_parameters(find_target(data["_target_"])):
        rule = "does not take `columns`, and a teacher reads captions by a tokenizer of its own; let it take that"
        raise UserError(rule, key="data._target_", value=data["_target_"])
    if readers:
        made = {name: CaptionIds(reader) for name, reader in readers.items()}
        data["columns"] = {**(data.get("columns") or {}), **made}


def validation_name_of(datamodule: lightning.LightningDataModule) -> str:
    """Name of the validation set of a data module that says it."""
    return str(getattr(datamodule, "validation_name", "val"))


def build_module(
    cfg: Mapping[str, Any], objectives: Mapping[str, Objective], *, validation_name: str
) -> lightning.LightningModule:
    """Builds what is trained; an encoder itself is made later, where the strategy wants it.

    Raises:
        UserError: for weights, or somebody else's model, that cannot be used.
    """
    shape = model_shape(cfg["model"])
    shared: dict[str, Any] = {
        "optimizer": build_optimizer_factory(cfg["optimizer"]),
        "scheduler": instantiate(cfg["scheduler"], _partial_=True),
        "validation_name": validation_name,
    }
    tokenizer: Any = build_any_tokenizer(cfg["model"])
    if cfg.get("task") is not None:
        sizes = {"image_size": shape.image_size, "patch_size": getattr(shape, "patch_size", None)}
        clip = cfg["trainer"].get("gradient_clip_val")
        return build_task(cfg["task"], {**shared, **sizes, "tokenizer": tokenizer}, clip=clip)
    if isinstance(shape, TowersConfig):
        towers = build_towers(cfg["model"], tokenizer)
        _check_pieces(towers, cfg["strategy"].get("micro_batches", 1))
        shared["adaptation"] = build_adaptation(cfg, None)
        return PretrainModule(model=towers, objectives=objectives, **shared)
    start = load_start(cfg["model"], trainable=True)
    initial_state = None if start is None else dict(start.state_dict())
    adaptation = build_adaptation(cfg, shape)
    with under("adaptation"):
        adaptation.begin(initial_state)
    shared |= {"adaptation": adaptation, "initial_state": initial_state}
    shared |= {"compiled": bool(cfg["trainer"].get("compile"))}
    shared |= {"tokenizer": pack_tokenizer(tokenizer.model_bytes, tokenizer.digest)}
    return PretrainModule(model=shape, objectives=objectives, **shared)


def _check_pieces(towers: TwoTowers, micro_batches: int) -> None:
    if micro_batches > 1 and (name := towers.batch_norm()) is not None:
        rule = f"must be 1: {towers.config.name} has batch normalisation ({name}), which would see a piece at a time"
        raise UserError(f"{rule}; use 1", key="strategy.micro_batches", value=micro_batches)


def load_start(model: Mapping[str, Any], *, trainable: bool = False) -> M2Encoder | None:
    """The model that `model.weights` names, from which a run starts; None to train from scratch.

    Raises:
        UserError: for weights that cannot be used.
    """
    weights, mapped = model.get("weights"), model.get("map_tokenizer") or False
    if weights is None:
        return None
    config, tokenizer = build_model_config(model), build_any_tokenizer(model)
    source = weights if str(weights).startswith(("http://", "https://")) else find_path(weights)
    mapped = mapped if isinstance(mapped, bool) else find_path(mapped)
    loaded = load(
        config,
        weights=source,
        tokenizer=cast("Any", tokenizer),
        trainable=trainable,
        map_tokenizer=mapped,
        stretch_positions=model.get("stretch_positions"),
    )
    return loaded.model


def build_adaptation(cfg: Mapping[str, Any], model: M2EncoderConfig | None) -> Adaptation:
    """What `adaptation` names; with None for somebody else's model, which is tried when it is adapted.

    Raises:
        UserError: for something else, or what does not fit the model.
    """
    node = (UNSAID | dict(cfg))["adaptation"]
    try:
        find_target(node["_target_"])
    except TargetError as error:  # of a run that was trained elsewhere
        raise UserError(error.text, key="adaptation._target_", value=node["_target_"]) from error
    if isinstance(start := node.get("start"), str):
        node = {**node, "start": str(find_path(start))}
    try:
        adaptation = instantiate(node)
    except InstantiationException as error:
        raise error.__cause__.under("adaptation") if isinstance(error.__cause__, UserError) else error from error
    if not isinstance(adaptation, Adaptation):
        rule = "must be a subclass of m2_encoder.training.adaptation.Adaptation; derive it from that"
        raise UserError(rule, key="adaptation._target_", value=node["_target_"])
    with under("adaptation"):
        adaptation.prepare(cast("Any", build_any_tokenizer(cfg["model"])))
    if model is not None:
        check_adaptation(adaptation, model)
    return adaptation


def build_trainer(
    cfg: Mapping[str, Any], folder: Path, callbacks: Sequence[lightning.Callback], *, resumes: bool = False
) -> tuple[lightning.Trainer, JsonlLogger]:
    """Builds the trainer with its loggers, which start here: W&B, too.

    Raises:
        UserError: for a logger that is none, or cannot start.
    """
    own = [OverfitVerdict()] if cfg["trainer"].get("overfit_batches") else []
    metrics = JsonlLogger(folder / METRICS_FILE)
    profiler = _build_profiler(cfg, folder)
    loggers = [metrics, *([] if cfg["trainer"].get("fast_dev_run") else build_loggers(cfg, folder, resumes=resumes))]
    if isinstance(profiler, StepProfiler):
        profiler.watch(loggers)
    trainer = instantiate(
        {key: value for key, value in cfg["trainer"].items() if key != "compile"},  # which Lightning does not know
        _convert_="all",  # of `max_time`
        strategy=instantiate(cfg["strategy"]),
        logger=loggers,
        **({} if profiler is None else {"profiler": profiler}),
        callbacks=[*callbacks, *own],
        plugins=_build_plugins(cfg["cluster"]["name"]),
        default_root_dir=str(folder),
    )
    return trainer, metrics


def _build_profiler(cfg: Mapping[str, Any], folder: Path) -> Profiler | None:
    """The profiler that `profiler` chooses, or `trainer.profiler` by Lightning's name for it."""
    node, name = cfg.get("profiler"), cfg["trainer"].get("profiler")
    if node is not None:
        takes = "dirpath" in read_parameters(find_target(node["_target_"]))
        profiler = instantiate(node, **({"dirpath": str(folder)} if takes else {}))
        if not isinstance(profiler, Profiler):
            rule = "must be a subclass of lightning.pytorch.profilers.Profiler; derive it from that"
            raise UserError(rule, key="profiler._target_", value=node["_target_"])
        return profiler
    kinds = {"simple": StepProfiler, "pytorch": TraceProfiler, "advanced": AdvancedProfiler}
    return kinds[name](dirpath=str(folder), filename="profile") if name in kinds else None


def _build_plugins(cluster: str) -> list[ClusterEnvironment]:
    """The environment that `cluster` names, so that no variable left over from elsewhere decides it."""
    if cluster == "slurm":
        return [SLURMEnvironment(auto_requeue=False)]  # submitit owns preemption
    if cluster == "torchrun" or TorchElasticEnvironment.detect():
        return [TorchElasticEnvironment()]
    return [LightningEnvironment()]


def build_formats(nodes: Mapping[str, Any]) -> dict[str, ExportFormat]:
    """Formats of an export by name.

    Raises:
        UserError: for something else.
    """
    made = {name: instantiate(node) for name, node in nodes.items()}
    check_kind("to", nodes, made, ExportFormat)
    return made


def build_tasks(nodes: Mapping[str, Any] | None) -> dict[str, EvaluationTask]:
    """Evaluation tasks by name; None stands for a run's configuration that is older than `evaluation`.

    Raises:
        UserError: for something else.
    """
    if nodes is None:
        tasks = {"retrieval": Retrieval(), "masked": Masked(), "masked_picture": MaskedPicture()}
        return {**tasks, "reconstruction": Reconstruction()}
    made = {name: instantiate(node) for name, node in nodes.items()}
    check_kind("evaluation", nodes, made, EvaluationTask)
    return made
