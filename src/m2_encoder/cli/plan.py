"""`m2-plan`: what a training step costs on a cluster, and which contrastive groups and micro-batches are fastest."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from m2_encoder.config.model_choice import find_path, output_problems
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import UNSET, show
from m2_encoder.config.rules import Rule, check_rules, choice, flag, number, whole
from m2_encoder.errors import UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.planning.cost import PRECISIONS, ModelCost, estimate_cost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.report import print_plan, to_report, train_overrides
from m2_encoder.planning.search import ScalingPoint, Wish, find_baselines, find_best, scale_worlds
from m2_encoder.planning.setting import STRATEGIES
from m2_encoder.planning.step import Prediction
from m2_encoder.record import describe_run

WORLD_SIZES: Final = tuple(2**power for power in range(3, 11))
"""Of the plot: 8 to 1,024 ranks."""
_FIGURE_SUFFIXES: Final = (".png", ".svg", ".pdf")
_MODELS: Final = {name.replace("-", "_").replace(".", "_"): name for name in NAME_TO_CONFIG}
"""Options of m2-train's `model`, with the names of the architectures."""
_CHOICES: Final = (
    "group_size", "micro_batches", "min_rows", "strategy", "recompute", "activation_checkpointing", "feature_bytes",
)  # fmt: skip


def _optional(rule: Rule) -> Rule:
    """The same rule, which null keeps, too."""
    return rule._replace(holds=lambda value: value is None or rule.holds(value), must=f"{rule.must}, or null")


_RULES: Final[tuple[Rule, ...]] = (
    choice("model", _MODELS, example="m2_encoder_1b"),
    whole("image_size", 1, "384", optional=True),
    whole("text_tokens", 2, "20", optional=True),
    choice("precision", PRECISIONS),
    whole("heads", 1, "1", most=2),
    whole("ranks", 1, "256", most=2**20),
    whole("global_batch_size", 1, "32768", most=2**40),
    whole("group_batch_size", 1, "8192", most=2**40),
    whole("group_size", 1, "32", optional=True),
    whole("micro_batches", 1, "4", optional=True),
    whole("min_rows", 1, "8"),
    _optional(choice("strategy", STRATEGIES)),
    _optional(flag("recompute")),
    _optional(flag("activation_checkpointing")),
    Rule("feature_bytes", lambda value: value in (2, 4) and not isinstance(value, bool), "2 or 4", "4"),
    number("memory_gb", "80", above=0, optional=True),
    flag("overwrite"),
    *(
        whole("hardware.devices_per_node", 1, "8", optional=True)
        if field.name == "devices_per_node"
        else number(f"hardware.{field.name}", "1", least=0, optional=True)
        for field in dataclasses.fields(Hardware)
    ),
)


class Plan(NamedTuple):
    """Everything that a command line asks for.

    Attributes:
        cost: of the model.
        hardware: constants, those of the command line included.
        wish: what was given.
        best: for every group size, the fastest setting that fits; the fastest first.
        baselines: the same rows with a loss over all ranks, the good one first.
        scaling: over world sizes, rows per rank as in the best setting.
    """

    cost: ModelCost
    hardware: Hardware
    wish: Wish
    best: list[Prediction]
    baselines: list[Prediction]
    scaling: list[ScalingPoint]


def check_plan(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of m2-plan."""
    if not isinstance(cfg["hardware"], Mapping):
        return [f"hardware={show(cfg['hardware'])}: must be constants by name, for example hardware.mfu=0.4"]
    problems = [problem.text for problem in check_rules(cfg, _RULES)]
    for key in ("output", "plot"):
        found = output_problems(cfg[key], overwrite=cfg["overwrite"])
        problems += [f"{key}={text.removeprefix('output=')}" for text in found]
    if isinstance(cfg["plot"], str):
        problems += _plot_problems(cfg["plot"])
    elif cfg["plot"] is not None and cfg["plot"] is not UNSET:
        problems.append(f"plot={cfg['plot']}: must be the name of a file, for example plot=plan.png")
    if problems:
        return problems
    try:
        build_plan(cfg)
    except UserError as error:
        return [str(error)]
    return []


def _plot_problems(plot: str) -> list[str]:
    if Path(plot).suffix not in _FIGURE_SUFFIXES:
        return [f"plot={plot}: must end in {', '.join(_FIGURE_SUFFIXES)}"]
    if importlib.util.find_spec("matplotlib") is None:
        return [f"plot={plot}: needs an extra; install it with pip install 'm2-encoder[plot]'"]
    return []


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
        raise UserError(
            f"ranks={cfg['ranks']}: must be a multiple of the {per_node} devices of a node; "
            f"use {cfg['ranks'] // per_node * per_node} or hardware.devices_per_node=N"
        )
    cost = estimate_cost(
        M2EncoderConfig.from_name(_MODELS[cfg["model"]], **overrides),
        precision=cfg["precision"],
        text_tokens=cfg["text_tokens"],
        heads=cfg["heads"],
    )
    wish = Wish(
        world_size=cfg["ranks"],
        global_rows=cfg["global_batch_size"],
        contrasted_rows=cfg["group_batch_size"],
        memory_gb=hardware.device_memory_gb if cfg["memory_gb"] is None else cfg["memory_gb"],
        **{key: cfg[key] for key in _CHOICES},
    )
    best = find_best(cost, hardware, wish)
    return Plan(
        cost=cost,
        hardware=hardware,
        wish=wish,
        best=best,
        baselines=find_baselines(cost, hardware, wish),
        scaling=scale_worlds(
            cost,
            hardware,
            wish,
            best[0].setting,
            world_sizes=WORLD_SIZES,
            fixed_group_size=per_node if best[0].setting.group_size != per_node else 2 * per_node,
        ),
    )


def read_hardware(cluster: str, overrides: Mapping[str, Any]) -> Hardware:
    """Constants of a cluster, with those of the command line.

    Args:
        cluster: an option of `conf/cluster/hardware`, or a YAML file like those.
        overrides: by name; None leaves what the file says.

    Raises:
        UserError: for an unknown cluster, a damaged file, or an impossible constant.
    """
    values = _read_constants(cluster) | {name: value for name, value in overrides.items() if value is not None}
    try:
        return Hardware.from_dict(values)
    except UserError as error:
        raise UserError(f"hardware of cluster={cluster}: {error}") from error


def _read_constants(cluster: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    folder = find_conf() / "cluster" / "hardware"
    path = folder / f"{cluster}.yaml"
    if not path.is_file():
        path = find_path(str(cluster))
    if not path.is_file():
        known = ", ".join(sorted(option.stem for option in folder.glob("*.yaml")))
        raise UserError(f"cluster={cluster}: no such cluster; choose from {known}, or give a YAML file like theirs")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cluster={cluster}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"cluster={cluster}: must hold constants as `name: number`")
    base, chain = values.pop("base", None), (*above, cluster)
    if base in chain:
        raise UserError(f"cluster={base}: is its own base, by way of {chain[-1]}")
    return (_read_constants(base, chain) if base else {}) | values


def run_plan(cfg: dict[str, Any]) -> None:
    """Prints the plan; writes it as JSON and draws it where asked to.

    Raises:
        UserError: as `build_plan`, or if a place cannot be written.
    """
    plan = build_plan(cfg)
    train = train_overrides(cfg, plan.best[0].setting, plan.hardware)
    print_plan(open_console(), plan.cost, plan.wish, plan.best, plan.baselines, cluster=cfg["cluster"], train=train)
    if cfg["output"] is not None:
        report = {
            **to_report(plan.cost, plan.hardware, plan.wish, plan.best, plan.baselines, plan.scaling),
            "train": train,
            "cluster": cfg["cluster"],
            "configuration": cfg,
            **describe_run(),
        }
        write_json(Path(cfg["output"]).expanduser(), report, key="output")
        print(f"numbers: {cfg['output']}")
    if cfg["plot"] is not None:
        # Here, because it loads matplotlib, which no other part of the command needs.
        from m2_encoder.planning.figure import draw_scaling

        planned, place = plan.best[0].setting, Path(cfg["plot"]).expanduser()
        draw_scaling(place, plan.scaling, plan.cost, plan.wish, cluster=cfg["cluster"], planned=planned)
        print(f"plot: {cfg['plot']}")
