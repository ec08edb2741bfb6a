"""What the command itself hands to the loggers of a run, and what they need of this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from m2_encoder.config.check import read_parameters
from m2_encoder.config.known import Known
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.errors import Problem

WANDB_TARGET: Final = "m2_encoder.runs.loggers.build_wandb_logger"
_GIVEN: Final[Mapping[str, Sequence[str]]] = {
    WANDB_TARGET: ("run_name", "folder", "cfg", "resumes"),
    "m2_encoder.runs.loggers.build_csv_logger": ("folder",),
    "m2_encoder.runs.mlflow_logger.MlflowLogger": ("run_name", "folder"),
}
_PACKAGES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "TensorBoardLogger": (("tensorboard", "tensorboardX"), "tensorboard"),
    "MlflowLogger": (("mlflow",), "mlflow"),
    "MLFlowLogger": (("mlflow",), "mlflow"),
    "CometLogger": (("comet_ml",), "comet-ml"),
    "NeptuneLogger": (("neptune",), "neptune"),
}
"""By the last part of a logger's target: modules of which it needs one, and what installs it."""


def given_to_loggers(nodes: Any) -> dict[str, Sequence[str]]:
    """Arguments that the command passes itself, by the path of the logger's node."""
    return {f"logger.{name}": _GIVEN.get(str(node.get("_target_")), ()) for name, node in _each(nodes)}


def give(node: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `values` that a logger of the package takes."""
    return {name: values[name] for name in _GIVEN.get(node["_target_"], ())}


def fill_folders(nodes: Mapping[Any, Any], folder: str) -> dict[Any, Any]:
    """The loggers of a configuration; those of others that take `save_dir`, and say none, get the run's folder."""
    return {name: {**node, "save_dir": folder} if _lacks_folder(node) else node for name, node in nodes.items()}


def _lacks_folder(node: Any) -> bool:
    if not isinstance(node, Mapping) or node.get("save_dir") is not None or node.get("_target_") in _GIVEN:
        return False
    try:
        return "save_dir" in read_parameters(find_target(str(node.get("_target_"))))
    except TargetError:  # whoever checks the target says it
        return False


def check_loggers(known: Known) -> Iterator[Problem]:
    """Packages that are not installed, and an artifact of what no run makes."""
    for name, node in _each(known("logger")):
        target = str(node.get("_target_"))
        modules, install = _PACKAGES.get(target.rpartition(".")[2], ((), ""))
        if modules and not any(map(_is_installed, modules)):
            rule = f"needs the package {modules[0]}, which is not installed"
            yield Problem(f"logger.{name}", target, rule, f"install it with pip install {install}")
        if target == WANDB_TARGET and node.get("artifact") == "export" and not known("run.export", True):
            fix = "set run.export=true, or upload artifact=checkpoint"
            yield Problem(f"logger.{name}.artifact", "export", "needs an export, and run.export is false", fix)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _each(nodes: Any) -> list[tuple[str, Mapping[str, Any]]]:
    entries = nodes.items() if isinstance(nodes, Mapping) else ()
    return [(str(name), node) for name, node in entries if isinstance(node, Mapping)]
