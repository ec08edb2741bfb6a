"""What `m2-plan` is asked, and the plan: for the command, and for notebooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import yaml
from annotated_types import Ge, Le

from m2_encoder.bounds import Count, Pixels, Positive, Rule, Text, Tokens
from m2_encoder.config.check import check_settings, check_targets, check_values, make_optional, read_parameters
from m2_encoder.config.groups import read_options
from m2_encoder.config.hardware_files import find_constants, read_constants
from m2_encoder.config.model_choice import output_problems
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import find_problems, show
from m2_encoder.config.targets import find_target
from m2_encoder.errors import Problem, UserError, under
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.planning.cost import ModelCost, estimate_cost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.search import Request, ScalingPoint, find_baselines, find_best, scale_worlds
from m2_encoder.planning.step import Prediction, predict

WORLD_SIZES: Final = tuple(2**power for power in range(3, 11))
"""Of the plot: 8 to 1,024 ranks."""
_MODELS: Final = {name.replace("-", "_").replace(".", "_"): name for name in NAME_TO_CONFIG}
"""Options of m2-train's `model`, with the names of the architectures."""
_FULL: Final = "m2_encoder.training.adaptation.Full"
_CHOICES: Final = (
    "group_size", "micro_batches", "min_rows", "strategy", "recompute", "activation_checkpointing", "feature_bytes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The keys of m2-plan; `conf/commands/plan.yaml` says what they mean."""

    model: Annotated[str, Rule(_MODELS.__contains__, f"one of {', '.join(_MODELS)}", "m2_encoder_1b")]
    image_size: Pixels | None
    text_tokens: Tokens | None
    precision: Literal["bf16-mixed", "16-mixed", "32-true"]
    heads: Annotated[int, Ge(1), Le(2)]
    cluster: Any
    ranks: Annotated[int, Ge(1), Le(2**20)]
    global_batch_size: Annotated[int, Ge(1), Le(2**40)]
    group_batch_size: Annotated[int, Ge(1), Le(2**40)]
    group_size: Count | None
    micro_batches: Count | None
    min_rows: Count
    strategy: Literal["grouped_ddp", "grouped_fsdp"] | None
    recompute: bool | None
    activation_checkpointing: bool | None
    feature_bytes: Literal[2, 4]
    memory_gb: Positive | None
    output: Text | None
    plot: Text | None
    overwrite: bool
    hardware: Mapping[str, Any]
    adaptation: Mapping[str, Any]


class Plan(NamedTuple):
    """Everything that a command line asks for."""

    cost: ModelCost  # of the model
    hardware: Hardware  # constants, those of the command line included
    request: Request  # what was given
    best: list[Prediction]  # for every group size, the fastest setting that fits; the fastest first
    baselines: list[Prediction]  # the same rows with a loss over all ranks, the good one first
    scaling: list[ScalingPoint]  # over world sizes, rows per rank as in the best setting
    whole: Prediction | None  # the best setting with everything trained, where `adaptation` trains less


def check_plan_settings(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-plan."""
    problems = check_settings(PlanSettings, cfg)
    if isinstance(cfg["hardware"], Mapping):
        problems += check_values("hardware", cfg["hardware"], make_optional(read_parameters(Hardware)))
    problems += check_targets({"adaptation": cfg["adaptation"]}, given={})
    problems += output_problems(cfg)
    if not problems:
        try:
            build_plan(cfg)
        except UserError as error:
            return find_problems(error)
    return problems


def build_plan(cfg: Mapping[str, Any]) -> Plan:
    """Predicts and searches; takes a fraction of a second.

    Raises:
        UserError: for numbers that do not divide each other, or if nothing fits into memory.
    """
    hardware = read_hardware(cfg["cluster"], cfg["hardware"])
    if cfg["precision"] == "32-true":  # torch multiplies without TF32 unless told otherwise
        hardware = dataclasses.replace(hardware, peak_tflops=hardware.peak_tflops_fp32)
    overrides = {} if cfg["image_size"] is None else {"image_size": cfg["image_size"]}
    per_node = hardware.devices_per_node
    if cfg["ranks"] > per_node and cfg["ranks"] % per_node:
        fix = f"use {cfg['ranks'] // per_node * per_node} or hardware.devices_per_node=N"
        rule = f"must be a multiple of the {per_node} devices of a node; {fix}"
        raise UserError(rule, key="ranks", value=cfg["ranks"])
    model = M2EncoderConfig.from_name(_MODELS[cfg["model"]], **overrides)
    options = {key: cfg[key] for key in ("precision", "text_tokens", "heads")}
    whole = estimate_cost(model, **options)
    with under("adaptation"):
        adapt = _build_adaptation(cfg["adaptation"])
        cost = whole if adapt is None else estimate_cost(model, **options, adapt=adapt)
    request = Request(
        world_size=cfg["ranks"],
        global_rows=cfg["global_batch_size"],
        contrasted_rows=cfg["group_batch_size"],
        memory_gb=hardware.device_memory_gb if cfg["memory_gb"] is None else cfg["memory_gb"],
        **{key: cfg[key] for key in _CHOICES},
    )
    best = find_best(cost, hardware, request)
    planned = best[0].setting
    fixed = per_node if planned.group_size != per_node else 2 * per_node
    scaling = scale_worlds(cost, hardware, request, planned, world_sizes=WORLD_SIZES, fixed_group_size=fixed)
    baselines = find_baselines(cost, hardware, request)
    compared = None if adapt is None else predict(whole, hardware, planned)
    return Plan(cost, hardware, request, best, baselines, scaling, compared)


def name_adaptation(node: Mapping[str, Any]) -> list[str]:
    """The overrides with which m2-train chooses an adaptation: its option, and what differs from that."""
    if not node or node.get("_target_") == _FULL:
        return []
    for name, (_, content) in read_options("adaptation", find_conf(), None).items():
        if content.get("_target_") == node["_target_"]:
            changed = [key for key, value in node.items() if content.get(key) != value]
            return [f"adaptation={name}", *(f"adaptation.{key}={show(node[key])}" for key in changed)]
    return [f"adaptation._target_={node['_target_']}"]


def _build_adaptation(node: Mapping[str, Any]) -> Callable[[M2Encoder], None] | None:
    """What `adaptation` does to a model; None if it trains everything."""
    if not node or node.get("_target_") == _FULL:
        return None
    made = find_target(str(node["_target_"]))
    apply: Callable[[M2Encoder], None] = made(**{key: value for key, value in node.items() if key != "_target_"}).apply
    return apply


def read_hardware(cluster: str, overrides: Mapping[str, Any]) -> Hardware:
    """Constants of a cluster (option of `conf/cluster/hardware`, or a YAML file) with given ones on top.

    Raises:
        UserError: for an unknown cluster, a damaged file, or an impossible constant.
    """
    try:
        values = read_constants(find_constants(str(cluster)))
    except UserError as error:
        raise UserError(str(error), key="cluster", value=cluster) from error
    try:
        return Hardware.from_dict(values | {name: value for name, value in overrides.items() if value is not None})
    except UserError as error:
        raise UserError(f"hardware: {error}", key="cluster", value=cluster) from error


def read_plan_settings() -> dict[str, Any]:
    """The keys of m2-plan with their defaults, from `conf/commands/plan.yaml`."""
    values: dict[str, Any] = yaml.safe_load((find_conf() / "commands" / "plan.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "defaults"}
