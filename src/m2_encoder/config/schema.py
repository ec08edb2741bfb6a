"""The shape of `m2-train`'s configuration: its top level, and the rules of single values.

The constructors are the schema of everything with a `_target_` (`signatures.py`). This file holds what has
none, and bounds that a signature cannot say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from m2_encoder.config.problems import UNSET, nearest, show
from m2_encoder.config.rules import (
    RESERVED_NAMES,
    SAFE_NAME,
    Problem,
    Rule,
    choice,
    flag,
    is_number,
    is_whole,
    number,
    text,
    whole,
)
from m2_encoder.data.emoji.dataset import EMOJI_STYLES
from m2_encoder.data.samples.captions import CAPTION_ROLES
from m2_encoder.errors import UserError
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.objectives.contrastive import HEADS
from m2_encoder.objectives.masked_image import MASKINGS
from m2_encoder.objectives.schedule import check_schedule
from m2_encoder.objectives.soft_targets import SOURCES, check_softness
from m2_encoder.objectives.token_head import DECODERS
from m2_encoder.types import LANGUAGES

RUN_KEYS: Final = ("name", "folder", "resume", "checkpoint_every", "export")
MODEL_FIELDS: Final = tuple(field.name for field in dataclasses.fields(M2EncoderConfig) if field.name != "name")
REAL_MODEL_FIELDS: Final = ("drop_path_rate", "layer_norm_eps", "position_init_std", "initial_temperature")
"""Fields of the model that are no sizes: they change no tensor's shape."""
MODEL_KEYS: Final = ("name", "weights", "tokenizer", *MODEL_FIELDS)
CLUSTER_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "local": ("name",),
    "torchrun": ("name",),
    "slurm": (
        "name", "partition", "account", "timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node", "max_requeues",
    ),
}  # fmt: skip
ROOT_KEYS: Final = (
    "seed", "run", "model", "data", "objective", "optimizer", "scheduler", "trainer", "strategy", "cluster", "logger",
    "callbacks",
)  # fmt: skip
_FIXES: Final = {
    "objective": "name at least one, for example objective=[itc]",
    **{
        group: f"choose an option with {group}=OPTION"
        for group in ROOT_KEYS
        if group not in {"seed", "run", "objective"}
    },
}
OPTIONAL_KEYS: Final = ("task", "evaluation", "adaptation")
TARGET_GROUPS: Final = ("data", "optimizer", "scheduler", "trainer", "strategy", "logger")
KEYED_GROUPS: Final = ("objective", "callbacks")

_ACCELERATORS: Final = ("auto", "cpu", "gpu", "cuda")
_PRECISIONS: Final = (
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "bf16", "16", "64", 32, 16, 64,
)  # fmt: skip


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(x) and 0 <= x < 1 for x in value)


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(is_whole(x) and x >= 0 for x in value) and len(set(value)) == len(value)
    return value == "auto" or (is_whole(value) and (value >= 1 or value == -1))


def _is_schedule(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(check_schedule(value))
    except UserError:
        return False


def _is_softness(value: Any) -> bool:
    try:
        return bool(check_softness(value))
    except UserError:
        return False


def _is_targets(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value  # null would train pixels where codes were chosen


def _is_interval(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value <= 1
    return is_whole(value) and value >= 1


def _is_share_or_count(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0 and (is_whole(value) or value <= 1))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(SAFE_NAME.fullmatch(value)) and value not in RESERVED_NAMES


def _weights_rule(key: str, names: tuple[str, ...], example: str) -> Rule:
    def holds(value: Any) -> bool:
        if not isinstance(value, dict) or not value or not set(value) <= set(names):
            return False
        weights = list(value.values())
        return all(is_number(x) and x >= 0 for x in weights) and any(weights)

    return Rule(key, holds, f"numbers, 0 or more and not all 0, for some of {', '.join(names)}", example)


def _is_sources(value: Any) -> bool:
    sources = [source for source in value.values() if source is not None] if isinstance(value, dict) else []
    return bool(sources) and all(isinstance(source, dict) for source in sources)


def _is_folders(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(folder, str) and folder.strip() for folder in value.values())


def _is_shards(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part.strip() for part in parts)


def _is_languages(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(part in LANGUAGES for part in parts)


def _is_steps(value: Any) -> bool:
    return is_whole(value) and value >= 1


TRAIN_RULES: Final[tuple[Rule, ...]] = (
    whole("seed", 0, "0", most=2**32 - 1),
    Rule(
        "run.name",
        _is_name,
        "a folder name of letters, digits and . _ = + -, at most 100 characters, "
        f"starting with a letter or digit, and none of {', '.join(RESERVED_NAMES)}",
        "my-run",
    ),
    text("run.folder", "outputs"),
    choice("run.resume", ("never", "auto", "must")),
    whole("run.checkpoint_every", 1, "500", note=" (steps)"),
    flag("run.export"),
    choice("model.name", tuple(NAME_TO_CONFIG), example="tiny"),
    text("model.weights", "m2_encoder_0.4B.ckpt", optional=True),
    text("model.tokenizer", "emoji"),
    *(
        whole(f"model.{field}", 1, "64" if field == "image_size" else "8", optional=True)
        for field in MODEL_FIELDS
        if field not in REAL_MODEL_FIELDS
    ),
    number("model.drop_path_rate", "0.1", least=0, below=1, optional=True),
    number("model.layer_norm_eps", "1e-5", above=0, below=1, optional=True),
    number("model.position_init_std", "0.02", above=0, optional=True),
    number("model.initial_temperature", "0.07", least=0.01, most=1, optional=True),
    text("data.folder", "outputs/data/emoji"),
    choice("data.heldout_style", EMOJI_STYLES, example="openmoji"),
    whole("data.global_batch_size", 2, "256", note=" (over all ranks)"),
    whole("data.eval_batch_size", 1, "256"),
    whole("data.num_workers", 0, "0"),
    Rule(
        "data.sources",
        _is_sources,
        "sources by name, each a mapping of keys, or null to leave it out, and at least one not null",
        "{main: {shards: PATHS}}",
    ),
    Rule("data.validation", _is_folders, "folders of tars by name", "{my: tars/val}"),
    Rule("data.sources.*.shards", _is_shards, "a path or url, or a list of them", "'/data/{000..099}.tar'"),
    Rule("data.sources.*.languages", _is_languages, f"some of {', '.join(LANGUAGES)}", "[zh, en]"),
    number("data.sources.*.weight", "0.5", least=0, optional=True),
    whole("data.sources.*.max_samples", 1, "1000000", optional=True),
    whole("data.sources.*.max_epochs", 1, "2", optional=True),
    whole("data.lanes", 1, "64"),
    whole("data.window", 1, "65536"),
    number("data.max_bad_share", "0.05", least=0, most=1),
    whole("data.max_bad_samples", 0, "100", optional=True),
    flag("data.new_segment"),
    flag("data.keep_decoded"),
    number("data.stall_timeout_s", "600", above=0),
    whole("data.check.shards", 1, "4"),
    whole("data.check.samples", 1, "2000"),
    text("data.cache.folder", "cache"),
    number("data.cache.max_bytes", "2e11", above=0),
    number("data.cache.timeout_s", "60", above=0),
    whole("data.cache.attempts", 1, "4"),
    _weights_rule("data.captions.language_weights", LANGUAGES, "{zh: 0.5, en: 0.5}"),
    _weights_rule("data.captions.role_weights", CAPTION_ROLES, "{name: 0.5, keyword: 0.5}"),
    whole("data.captions.max_keywords", 1, "4"),
    flag("data.captions.every_language"),
    number("objective.*.weight", "1.0", least=0),
    Rule("objective.*.schedule", _is_schedule, "factors of the weight by step, not all 0, or null", "[[0,0],[1000,1]]"),
    number("objective.*.mask_ratio", "0.5", above=0, below=1),
    choice("objective.*.decoder", DECODERS),
    choice("objective.*.masking", MASKINGS),
    Rule(
        "objective.*.targets",
        _is_targets,
        "keys with a _target_ (pixels: objective=[cmim])",
        "'{_target_: m2_encoder.objectives.patch_targets.NormalizedPixels}'",
    ),
    text("objective.*.targets.tokenizer", "outputs/visual_tokenizer/export"),
    flag("objective.*.text_expert"),
    number("objective.*.label_smoothing", "0.1", least=0, below=1),
    flag("objective.*.multi_positive"),
    number("objective.*.initial_bias", "-10", least=-1000, most=1000),
    Rule("objective.*.softness", _is_softness, "a number in [0, 1), or such numbers by step", "[[0,0],[10000,0.3]]"),
    choice("objective.*.source", SOURCES),
    number("objective.*.temperature", "0.07", above=0, optional=True),
    number("objective.*.hardness", "0.1", least=0),
    whole("objective.*.hard_negatives", 1, "10", optional=True),
    number("objective.*.max_similarity", "0.95", above=-1, most=1),
    whole("objective.*.seed", 0, "0", most=2**32 - 1),
    text("objective.*.teacher", "outputs/emoji/export"),
    text("objective.*.teacher_weights", "m2_encoder_1B.ckpt", optional=True),
    number("objective.*.feature_weight", "1.0", least=0),
    number("objective.*.similarity_weight", "1.0", least=0),
    Rule(
        "objective.*.teacher_language",
        lambda value: value in (None, *LANGUAGES),
        f"null or {', '.join(LANGUAGES)}",
        "en",
    ),
    whole("objective.*.chunk_size", 1, "256"),
    Rule(
        "objective.*.heads",
        lambda value: (
            isinstance(value, list) and "features" in value and all(value.count(x) == (x in HEADS) for x in value)
        ),
        f"[features] or [{', '.join(HEADS)}]",
        "[features]",
    ),
    whole("task.num_codes", 2, "8192"),
    *(whole(f"task.{key}", 1, "32") for key in ("code_dim", "embed_dim", "num_heads", "num_layers")),
    whole("task.num_decoder_layers", 1, "2"),
    number("task.commitment_weight", "1.0", least=0),
    number("task.decay", "0.99", least=0, below=1),
    number("task.restart_below", "0.03", least=0, below=1),
    number("optimizer.lr", "1e-3", above=0, most=10),
    Rule("optimizer.betas", _is_pair, "two numbers in [0, 1)", "[0.9, 0.98]"),
    number("optimizer.eps", "1e-6", above=0, most=1),
    number("optimizer.weight_decay", "0.2", least=0),
    number("optimizer.logit_scale_lr_ratio", "20", above=0, most=1000),
    number("optimizer.matrix_lr", "2e-3", above=0, most=10),
    number("optimizer.momentum", "0.95", least=0, below=1),
    whole("scheduler.warmup_steps", 0, "100"),
    whole("scheduler.max_steps", 1, "1000"),
    number("scheduler.min_lr_ratio", "0.1", least=0, most=1),
    choice("trainer.accelerator", _ACCELERATORS),
    Rule("trainer.devices", _is_devices, "a whole number, 1 or more (-1: all), auto, or a list of indices", "1"),
    whole("trainer.num_nodes", 1, "1"),
    Rule(
        "trainer.precision",
        lambda value: not isinstance(value, bool | list | dict) and value in _PRECISIONS,
        f"one of {', '.join(str(item) for item in _PRECISIONS[:6])}",
        "bf16-mixed",
    ),
    whole("trainer.max_steps", 1, "1000"),
    whole("trainer.max_epochs", -1, "-1", optional=True),
    number("trainer.gradient_clip_val", "1.0", above=0, optional=True),
    choice("trainer.gradient_clip_algorithm", ("norm",)),
    Rule("trainer.val_check_interval", _is_interval, "a number of steps, 1 or more, or a share in (0, 1]", "500"),
    whole("trainer.check_val_every_n_epoch", 1, "null", optional=True),
    Rule("trainer.limit_val_batches", _is_share_or_count, "a number of batches, or a share in 0..1", "1.0"),
    Rule("trainer.limit_train_batches", _is_share_or_count, "a number of batches, or a share in 0..1", "1.0"),
    Rule("trainer.log_every_n_steps", _is_steps, "a whole number, 1 or more", "10"),
    Rule(
        "trainer.accumulate_grad_batches",
        lambda value: is_whole(value) and value == 1,
        "1: strategy.micro_batches accumulates, with one loss over all rows of a step",
        "1",
    ),
    whole("trainer.num_sanity_val_steps", -1, "0"),
    whole("strategy.group_size", 1, "8", optional=True, note=" (ranks)"),
    whole("strategy.group_nodes", 1, "1", optional=True, note=" (nodes)"),
    whole("strategy.micro_batches", 1, "4"),
    flag("strategy.recompute"),
    flag("strategy.activation_checkpointing"),
    flag("strategy.reshard_after_forward"),
    choice("logger.mode", ("auto", "online", "offline", "disabled")),
    text("logger.project", "m2-encoder"),
    text("logger.entity", "my-team", optional=True),
    text("logger.group", "my-sweep", optional=True),
    whole("logger.flush_every_n_steps", 1, "100"),
    choice("cluster.name", tuple(CLUSTER_KEYS)),
    whole("cluster.timeout_min", 1, "1440"),
    whole("cluster.cpus_per_task", 1, "8", optional=True),
    whole("cluster.mem_gb", 1, "64", optional=True),
    whole("cluster.max_requeues", 0, "10"),
    whole("callbacks.checkpoint.every_n_steps", 1, "500"),
)


def check_shape(cfg: Mapping[str, Any]) -> list[Problem]:
    """Names at the levels that have no `_target_`, and that every group is there at all."""
    has_task = cfg.get("task") is not None
    required = [key for key in ROOT_KEYS if not (has_task and key == "objective")]
    # A group whose every option was taken away is as good as none.
    present = {key: value for key, value in cfg.items() if key != "objective" or value != {}}
    problems = _check_keys("", present, (*ROOT_KEYS, *OPTIONAL_KEYS), required=required)
    optional = [key for key in OPTIONAL_KEYS if cfg.get(key) is not None]
    for group in (*TARGET_GROUPS, *KEYED_GROUPS, "run", "model", "cluster", *optional):
        node = cfg.get(group, UNSET)
        if node is not UNSET and not isinstance(node, Mapping):
            fix = "choose an option with group=option when composing from conf/, or set single keys"
            problems.append(Problem(group, f"{group}={show(node)}: must be a mapping of keys; {fix}"))
    problems += _check_objectives(cfg.get("objective"))
    problems += check_tasks(cfg.get("evaluation"))
    run, model, cluster = (cfg.get(name) for name in ("run", "model", "cluster"))
    if isinstance(run, Mapping):
        problems += _check_keys("run", run, RUN_KEYS, required=RUN_KEYS)
    if isinstance(model, Mapping):
        problems += _check_keys("model", model, MODEL_KEYS, required=("name", "tokenizer"))
    if isinstance(cluster, Mapping):
        name = cluster.get("name")
        allowed = CLUSTER_KEYS.get(name, CLUSTER_KEYS["slurm"]) if isinstance(name, str) else CLUSTER_KEYS["slurm"]
        problems += _check_keys("cluster", cluster, allowed, required=("name",))
    return problems


def _check_objectives(objectives: Any) -> list[Problem]:
    """Entries from which nothing could be built."""
    problems = []
    for name, value in (objectives if isinstance(objectives, Mapping) else {}).items():
        key = f"objective.{name}"
        if not _may_be_named(str(name)):
            rule = "an objective cannot have this name, which means something else"
            problems.append(Problem(key, f"{key}: {rule}; give it another, for example objective.my_{name}"))
        elif not isinstance(value, Mapping) or "_target_" not in value:
            fix = f"choose {name} in objective=[...] if there is such an option, or name its class in {key}._target_"
            problems.append(Problem(key, f"{key}={show(value)}: must have a _target_; {fix}"))
    return problems


def check_tasks(tasks: Any) -> list[Problem]:
    """Evaluation tasks from which nothing could be built."""
    problems = []
    for name, value in (tasks if isinstance(tasks, Mapping) else {}).items():
        key = f"evaluation.{name}"
        if not isinstance(value, Mapping) or "_target_" not in value:
            fix = f"choose {name} in evaluation=[...] if there is such an option, or name its class in {key}._target_"
            problems.append(Problem(key, f"{key}={show(value)}: must have a _target_; {fix}"))
    return problems


def _may_be_named(name: str) -> bool:
    try:
        nn.ModuleDict({name: nn.Identity()})  # where objectives are kept, which has attributes of its own
    except KeyError:
        return False
    return name != "total"  # of the losses


def _check_keys(
    path: str, node: Mapping[str, Any], allowed: tuple[str, ...], *, required: Sequence[str]
) -> list[Problem]:
    where = path or "the configuration"
    problems = []
    for key, value in node.items():
        if key not in allowed:
            full = f"{path}.{key}".lstrip(".")
            known = ", ".join(allowed)
            near = nearest(key, allowed)
            problems.append(Problem(full, f"{full}={show(value)}: {where} has no key {key!r}{near}; it has {known}"))
    for key in required:
        if key not in node:
            full = f"{path}.{key}".lstrip(".")
            problems.append(Problem(full, f"{full}: is missing; {_FIXES.get(full, f'add {full}=VALUE')}"))
    return problems
