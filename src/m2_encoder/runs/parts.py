"""Other people's parts of a run: optimizers of torch, data modules and tasks that take what they name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import lightning
from hydra.utils import instantiate
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from m2_encoder.config.check import read_parameters
from m2_encoder.config.foreign_model import left_out
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.targets import find_target
from m2_encoder.errors import UserError, name_some
from m2_encoder.training.callbacks.checkpoint import is_plain
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.optim import OptimizerFactory
from m2_encoder.training.visual_tokenizer_module import VisualTokenizerModule

FEATURE_METHODS: Final = ("encode_image", "encode_text")
"""Of a task that is evaluated as a model is."""


def choose_taken(target: str, values: Mapping[str, Any], *, node: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values that a target's signature names, and that its node does not give itself."""
    parameters = read_parameters(find_target(target))
    return {name: value for name, value in values.items() if name in parameters and name not in node}


def build_optimizer_factory(node: Mapping[str, Any]) -> OptimizerFactory:
    """What makes the optimizer of a module: a function of the module, or a class of torch's, which gets one group."""
    make = instantiate(node, _partial_=True)
    called = find_target(str(node["_target_"]))
    is_class = inspect.isclass(called) and issubclass(called, Optimizer)
    return partial(_build_plain, make) if is_class else make


def _build_plain(make: Any, module: nn.Module) -> Optimizer:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError("no parameter wants a gradient; there is nothing to train")
    # The names let a checkpoint load whatever the order, and under every strategy.
    optimizer: Optimizer = make([{"params": [each for _, each in named], "names": [name for name, _ in named]}])
    return optimizer


def build_task(node: Mapping[str, Any], values: Mapping[str, Any], *, clip: float | None) -> lightning.LightningModule:
    """The LightningModule that `task` names; `clip` is `trainer.gradient_clip_val`.

    Raises:
        UserError: if it makes something else, or cannot be clipped.
    """
    target = str(node["_target_"])
    made = instantiate({"_convert_": "all", **node}, **choose_taken(target, values, node=node))
    if not isinstance(made, lightning.LightningModule):
        raise UserError(f"makes {type(made).__name__}, which is no LightningModule", key="task._target_", value=target)
    if not made.automatic_optimization and clip is not None:
        rule = f"must be null: {target} optimizes by hand, and clips by hand where it wants to"
        raise UserError(rule, key="trainer.gradient_clip_val", value=clip)
    return made


def describe_foreign(
    cfg: Mapping[str, Any], module: lightning.LightningModule, datamodule: lightning.LightningDataModule
) -> list[str]:
    """What of a configuration somebody else's model or task does not use, a line each.

    Raises:
        UserError: if task and data both save a setting of one name (`save_hyperparameters`), which Lightning refuses.
    """
    shared = module.hparams_initial.keys() & datamodule.hparams_initial.keys()
    if odd := sorted(name for name in shared if module.hparams_initial[name] != datamodule.hparams_initial[name]):
        rule = f"saves {name_some(odd)} as its settings, and so does the task, with other values"
        fix = f"use save_hyperparameters(ignore=[{odd[0]!r}]) in one of them"
        raise UserError(f"{rule}; {fix}", key="data._target_", value=cfg["data"]["_target_"])
    if cfg.get("task") is not None:
        return [] if isinstance(module, VisualTokenizerModule) else _describe_task(cfg, module)
    if not is_foreign(cfg["model"]) or not isinstance(module, PretrainModule):
        return []
    lines, name = [], str(cfg["model"]["_target_"])
    if keys := left_out(cfg["model"]):
        lines.append(f"{', '.join(f'model.{key}' for key in keys)}: say nothing of {name}, and are left out")
    if frozen := module.frozen_towers():
        lines.append(f"{name}: {name_some(frozen)} get no gradient of the features, and are frozen")
    return lines


def _describe_task(cfg: Mapping[str, Any], module: lightning.LightningModule) -> list[str]:
    target = str(cfg["task"]["_target_"])
    named, lines = read_parameters(find_target(target)), []
    unused = [name for name in ("optimizer", "scheduler") if name not in named]
    if unused:
        does = "does" if len(unused) == 1 else "do"
        lines.append(f"{' and '.join(unused)} {does} nothing: {target} takes no such argument")
    lines.append("model gives the size of pictures and the tokenizer alone: the task has a model of its own")
    lines.append("nothing is exported: load_from_checkpoint of the task's class reads checkpoints/last.ckpt")
    if odd := [name for name, value in module.hparams.items() if not is_plain(value)]:
        lines.append(f"checkpoints leave out {name_some(odd)} of its settings, which are no plain values")
    if not is_overridden("validation_step", module):
        lines.append(f"nothing is validated: {target} has no validation_step")
    if not gives_features(module):
        lines.append(f"nothing is measured at the end: {target} has no encode_image and encode_text")
    return lines


def is_ours(module: lightning.LightningModule) -> bool:
    """Whether what is trained is one of our tasks."""
    return isinstance(module, PretrainModule | VisualTokenizerModule)


def gives_features(module: nn.Module) -> bool:
    """Whether evaluation can encode images and texts with it."""
    return all(callable(getattr(module, name, None)) for name in FEATURE_METHODS)
