"""The parts of `m2-train`'s configuration that have no `_target_`, and bounds of Lightning's `Trainer`.

The constructors are the schema of everything else; `check.py` reads both.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Le, Len

from m2_encoder.bounds import Count, Example, Fraction, Index, Many, Pixels, Positive, Rule, Seed, Text, Tokens
from m2_encoder.config.check import Parameters, check_values, make_optional, read_parameters
from m2_encoder.config.problems import UNSET
from m2_encoder.config.sweeps import MAX_NAME_BYTES
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.pictures import POLICY_RULE, is_policy

_MOST: Final = 10**9
_MOST_LETTERS: Final = 64
SAFE_NAME: Final = re.compile(r"[^\W_][\w.=+-]{0,99}")  # letters of any script
RESERVED_NAMES: Final = ("data", "multirun")
TARGET_GROUPS: Final = ("data", "optimizer", "scheduler", "trainer", "strategy")
KEYED_GROUPS: Final = ("objective", "callbacks", "logger")
OPTIONAL_KEYS: Final = ("task", "evaluation", "adaptation", "profiler")
ROOT_KEYS: Final = ("seed", "run", "model", *TARGET_GROUPS, *KEYED_GROUPS, "cluster")
MODEL_FIELDS: Final = tuple(field.name for field in dataclasses.fields(M2EncoderConfig) if field.name != "name")
REAL_MODEL_FIELDS: Final = ("drop_path_rate", "layer_norm_eps", "position_init_std", "initial_temperature")
"""Fields of the model that are no sizes: they change no tensor's shape."""

_NAME_RULE: Final = Rule(
    lambda name: (
        bool(SAFE_NAME.fullmatch(name)) and len(name.encode()) <= MAX_NAME_BYTES and name not in RESERVED_NAMES
    ),
    "a folder name of letters (of any script), digits and . _ = + -, at most 100 characters and "
    f"{MAX_NAME_BYTES} bytes, starting with a letter or digit, and none of {', '.join(RESERVED_NAMES)}",
    "my-run",
)
Pictures = Annotated[Any, Rule(lambda value: value is None or is_policy(value), POLICY_RULE, "standard")]
"""What the pixels of pictures are; None: as the weights were trained."""

_MODEL_RULE: Final = Rule(NAME_TO_CONFIG.__contains__, f"one of {', '.join(NAME_TO_CONFIG)}", "tiny")


Word = Annotated[
    str, Rule(lambda word: 0 < len(word.strip()) <= _MOST_LETTERS, f"a word of 1..{_MOST_LETTERS} letters", "a")
]
"""A tag; W&B takes no longer ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The keys of `run`."""

    name: Annotated[str, _NAME_RULE]  # of the run's folder
    folder: Annotated[Text, Example("outputs")]  # where runs lie
    resume: Literal["never", "auto", "must"]  # whether a run that exists goes on
    checkpoint_every: Annotated[Count, Example("500")]  # steps
    keep_last: Annotated[Count | None, Example("3")] = 3  # checkpoints; None, as in older configurations: all
    keep_every: Annotated[Count | None, Example("5000")] = None  # steps
    final: Literal["last", "best", "ema"] = "last"  # the weights that are evaluated and exported
    export: bool  # write the trained model at the end
    task: Text | None = None  # what the run is for
    tags: Annotated[Sequence[Word], Example("[a,b]")] = ()  # words to find it by
    notes: Text | None = None  # about it
    debug: bool = False  # only a try
    metric: Text | None = None  # what sweeps compare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The keys of `model` beside the fields of `M2EncoderConfig`, all of which may be null."""

    name: Annotated[str, _MODEL_RULE]  # a row of `NAME_TO_CONFIG`
    tokenizer: Annotated[Text, Example("emoji")]  # `emoji`, or the path of a SentencePiece model
    weights: Text | None = None  # a checkpoint to start from
    # true: the weights' rows go to the same pieces of another tokenizer; or the file of the weights' own
    map_tokenizer: bool | Text | None = None
    # with a longer context_length than the weights': how many of their positions stay, where the others are stretched
    stretch_positions: Count | None = None
    # what the pixels of its pictures are; None: as the weights were trained, `standard` from scratch
    pictures: Pictures = None
    num_parameters: Many | None = None  # of the encoder; every run fills it in


_CHANNELS: Final = Len(3, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """The keys of `model` beside the arguments of the constructor that `model._target_` names."""

    tokenizer: Any  # `emoji`, the path of a SentencePiece model, or a node with a _target_
    image_size: Annotated[Pixels, Example("224")]  # of the images that it gets
    context_length: Tokens | None = None  # most tokens of a text of a SentencePiece tokenizer
    name: Text | None = None  # in pictures and tables
    weights: Text | None = None  # a file of its state dict to start from
    map_tokenizer: None = None  # its token table is not known
    stretch_positions: None = None  # nor its positions
    pictures: Pictures = None
    pixel_mean: Annotated[list[Fraction], _CHANNELS] | None = None  # taken from pixels in 0..1
    pixel_std: Annotated[list[Positive], _CHANNELS] | None = None  # divides them then


def is_foreign(model: Any) -> bool:
    """Whether a node `model` names somebody else's."""
    return isinstance(model, Mapping) and "_target_" in model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The key of `cluster` where ranks are started here or by torchrun."""

    name: Literal["local", "torchrun", "slurm"]  # who starts them


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmCluster(Cluster):
    """The keys of `cluster` for SLURM, as submitit takes them."""

    name: Literal["local", "torchrun", "slurm"]
    partition: Text | None = None
    account: Text | None = None
    timeout_min: Count = 1440
    cpus_per_task: Count | None = 8
    mem_gb: Count | None = None
    gpus_per_node: Any = None
    max_requeues: Index = 10


def _are_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(each) is int and each >= 0 for each in value) and len(set(value)) == len(value)
    return value == "auto" or (type(value) is int and (value >= 1 or value == -1))


def _is_share_or_count(value: Any) -> bool:
    return value is None or (0 <= value <= 1 if type(value) is float else type(value) is int and 0 <= value <= _MOST)


def _is_length(value: Any) -> bool:
    return value is None or (type(value) is int and (value == -1 or 1 <= value <= _MOST))


def _is_interval(value: Any) -> bool:
    return 0 < value <= 1 if type(value) is float else type(value) is int and 1 <= value <= _MOST


_PRECISIONS: Final = (
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "bf16", "16", "64", 32, 16, 64,
)  # fmt: skip
_ONE_PIECE: Final = "1: strategy.micro_batches accumulates, with one loss over all rows of a step"
_STEPS: Final = f"a whole number, 1 or more and at most {_MOST}, or -1: as trainer.max_epochs says"
_SHARE_OF_EPOCH: Final = f"a number of batches in 1..{_MOST}, or a share in (0, 1]"
_RECORDS: Final = "false: a run writes metrics.jsonl and checkpoints; trainer.fast_dev_run=true tries one without them"
_FAST: Final = f"true, false, or a number of batches in 0..{_MOST}"
ShareOrCount = Annotated[Any, Rule(_is_share_or_count, f"a number of batches in 0..{_MOST}, or a share in 0..1", "1.0")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Bounds of arguments of Lightning's `Trainer`, whose signature has the names of all, and of `compile`."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    devices: Annotated[
        Any, Rule(_are_devices, "a whole number, 1 or more (-1: all), auto, or a list of indices", "1")
    ] = 1
    num_nodes: Count = 1
    precision: Annotated[
        Any,
        Rule(
            lambda value: type(value) in (str, int) and value in _PRECISIONS,
            f"one of {', '.join(map(str, _PRECISIONS[:6]))}",
            "bf16-mixed",
        ),
    ] = "32-true"
    max_steps: Annotated[Any, Rule(lambda value: value is not None and _is_length(value), _STEPS, "1000")] = 1000
    max_epochs: Annotated[Any, Rule(_is_length, "a whole number, 1 or more, or -1 or null: steps decide", "2")] = -1
    min_steps: Index | None = None
    min_epochs: Index | None = None
    gradient_clip_val: Annotated[Positive, Example("1.0")] | None = 1.0
    gradient_clip_algorithm: Literal["norm", "value"] | None = "norm"
    val_check_interval: Annotated[
        Any, Rule(_is_interval, f"a number of steps, 1 or more and at most {_MOST}, or a share in (0, 1]", "500")
    ] = 500
    check_val_every_n_epoch: Count | None = None
    limit_val_batches: ShareOrCount = 1.0
    limit_train_batches: Annotated[
        Any, Rule(lambda value: value is None or _is_interval(value), _SHARE_OF_EPOCH, "1.0")
    ] = 1.0
    log_every_n_steps: Count = 10
    accumulate_grad_batches: Annotated[Any, Rule(lambda value: type(value) is int and value == 1, _ONE_PIECE, "1")] = 1
    num_sanity_val_steps: Annotated[int, Ge(-1), Le(10**9)] = 0
    overfit_batches: Annotated[
        Any,
        Rule(
            lambda value: value is not None and _is_share_or_count(value),
            f"a number of batches in 0..{_MOST}, or a share in 0..1",
            "3",
        ),
    ] = 0
    fast_dev_run: Annotated[
        Any, Rule(lambda value: type(value) is bool or (type(value) is int and 0 <= value <= _MOST), _FAST, "true")
    ] = False
    reload_dataloaders_every_n_epochs: Index = 0
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    compile: bool = False
    barebones: Annotated[Any, Rule(lambda value: value is False, _RECORDS, "false")] = False


def check_shape(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with `seed`, `run`, `model`, `cluster`, known arguments of `trainer`, and the names of groups."""
    has_task = cfg.get("task") is not None
    root = {key: inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=Any) for key in ROOT_KEYS}
    root["seed"] = root["seed"].replace(annotation=Seed)
    for key in (*OPTIONAL_KEYS, *(["objective"] if has_task else [])):
        root[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=Any, default=None)
    # A group whose every option was taken away is as good as none.
    present = {key: value for key, value in cfg.items() if key != "objective" or value != {}}
    problems = [_name_choice(problem) for problem in check_values("", present, root, name="the configuration")]
    parts: dict[str, Parameters] = {
        "run": read_parameters(Run), "model": _model_parameters(), "cluster": _cluster_parameters(cfg.get("cluster")),
    }  # fmt: skip
    optional = [key for key in OPTIONAL_KEYS if cfg.get(key) is not None]
    for group in (*TARGET_GROUPS, *KEYED_GROUPS, *parts, *optional):
        node = cfg.get(group, UNSET)
        if node is UNSET:
            continue
        if not isinstance(node, Mapping):
            fix = "choose an option with group=option when composing from conf/, or set single keys"
            problems.append(Problem(group, node, "must be a mapping of keys", fix))
            continue
        if group in (*TARGET_GROUPS, "task", "adaptation", "profiler") and "_target_" not in node:
            fix = f"choose an option with {group}=OPTION, or name a class"
            problems.append(Problem(f"{group}._target_", NOTHING, "is missing", fix))
        if group == "model" and is_foreign(node):
            continue  # `foreign_model.check_model`
        if group in parts:
            problems += check_values(group, node, parts[group])
        elif group == "trainer":
            bounds = read_parameters(Trainer)
            problems += check_values(group, {key: value for key, value in node.items() if key in bounds}, bounds)
    for group in ("callbacks", "logger"):
        for name, value in _entries(cfg.get(group)):
            problems += _check_entry(group, name, value)
    return [*problems, *_check_objectives(cfg.get("objective")), *check_tasks(cfg.get("evaluation"))]


def _model_parameters() -> Parameters:
    return {**make_optional(read_parameters(M2EncoderConfig)), **read_parameters(Model)}


def _cluster_parameters(cluster: Any) -> Parameters:
    is_slurm = isinstance(cluster, Mapping) and cluster.get("name") not in ("local", "torchrun")
    return read_parameters(SlurmCluster if is_slurm else Cluster)


def _name_choice(problem: Problem) -> Problem:
    """A group that is missing can be chosen."""
    if problem.value is not NOTHING or problem.key in ("seed", "run"):
        return problem
    choose = f"choose an option with {problem.key}=OPTION"
    return problem._replace(
        fix="name at least one, for example objective=[itc]" if problem.key == "objective" else choose
    )


def check_tasks(tasks: Any, group: str = "evaluation") -> list[Problem]:
    """Evaluation tasks, or options of another group, from which nothing could be built."""
    return [problem for name, value in _entries(tasks) for problem in _check_entry(group, name, value)]


def _entries(node: Any) -> list[tuple[str, Any]]:
    return list(node.items()) if isinstance(node, Mapping) else []


def _check_entry(group: str, name: str, value: Any) -> list[Problem]:
    if isinstance(value, Mapping) and "_target_" in value:
        return []
    key = f"{group}.{name}"
    in_list = f"choose {name} in {group}=[...] if there is such an option"
    choose = f"leave it out with ~{key}" if group == "callbacks" else in_list
    fix = f"{choose}, or name its class in {key}._target_"
    return [Problem(key, value, "must have a _target_", fix)]


def _check_objectives(objectives: Any) -> list[Problem]:
    """Entries from which nothing could be built."""
    problems = []
    for name, value in _entries(objectives):
        if not _may_be_named(str(name)):
            rule = "an objective cannot have this name, which means something else"
            fix = f"give it another, for example objective.my_{name}"
            problems.append(Problem(f"objective.{name}", NOTHING, rule, fix))
        else:
            problems += _check_entry("objective", name, value)
    return problems


def _may_be_named(name: str) -> bool:
    from torch import nn  # a second

    try:
        nn.ModuleDict({name: nn.Identity()})  # where objectives are kept, which has attributes of its own
    except KeyError:
        return False
    return name != "total"  # of the losses
