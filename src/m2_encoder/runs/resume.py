"""A run that goes on: whether its checkpoint fits, and its records as they were where it does not."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import lightning
import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import Objective
from m2_encoder.runs.changes import find_changes
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_config, read_content, read_step
from m2_encoder.runs.frozen_files import FROZEN_FILE, counting_nodes
from m2_encoder.runs.start import CHECK_FILE
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.visual_tokenizer_module import VisualTokenizerModule

_RECORDS: Final = (CONFIG_FILE, FROZEN_FILE, CHECK_FILE)
_LOAD_ERROR: Final = "Error(s) in loading state_dict"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def restored_unless_trained(folder: Path, cfg: Mapping[str, Any], trainer: lightning.Trainer) -> Iterator[None]:
    """Puts the records of a continued run back if it ends before its first step, whatever ends it.

    Args:
        folder: the run's, as it stands before anything is written.
        cfg: the resolved configuration.
        trainer: tells how far the run came.

    Raises:
        UserError: in place of torch's error, for a checkpoint that could not be compared earlier and does not load.
    """
    begun = read_step(folder / LAST_CHECKPOINT)  # before a step is done, which may be saved and then fail
    paths = [folder / name for name in _RECORDS] if trainer.is_global_zero else []
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException as error:
        if trainer.global_step <= begun:
            for path, content in before.items():
                _put_back(path, content)
        if isinstance(error, RuntimeError) and _LOAD_ERROR in str(error):
            lines = (line.strip(" \t.") for line in str(error).splitlines()[1:])
            first = next((line for line in lines if line), "torch does not say why")
            raise UserError(f"{_misfit(cfg)}: {first}; give another run.name") from error
        raise


def _put_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        return
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _misfit(cfg: Mapping[str, Any]) -> str:
    return f"run.name={cfg['run']['name']}: its checkpoint does not fit"


def check_parameters(
    module: PretrainModule | VisualTokenizerModule, checkpoint: Path, *, cfg: Mapping[str, Any], folder: Path
) -> None:
    """Refuse a checkpoint with other parameters than a module has, before anything is written or started.

    Args:
        module: of the run; not built yet, and left so.
        checkpoint: of the run that is continued.
        cfg: the resolved configuration.
        folder: the run's.

    Raises:
        CheckpointError: if the file is damaged.
        UserError: naming the first parameter that differs.
    """
    wanted, unknown = _shapes(module)
    saved = read_content(checkpoint)["state_dict"]
    there = {name: tuple(value.shape) for name, value in saved.items() if not name.startswith(unknown)}
    if (found := _first_difference(there, wanted)) is None:
        return
    name, said = found
    fix = "give another run.name"
    if name.startswith("objectives.") and (folder / CONFIG_FILE).is_file():
        own = name.split(".")[1]
        before, now = (counting_nodes(each).get(own) for each in (read_config(folder / CONFIG_FILE), cfg))
        if before is not None and now is not None and (changes := find_changes(before, now)):
            key = f".{changes[0].key}" if len(changes) == 1 else ""
            fix = f"leave objective.{own}{key} as it was, or {fix}"
    raise UserError(f"{_misfit(cfg)}: {said}; {fix}")


def _shapes(
    module: PretrainModule | VisualTokenizerModule,
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Shapes by name, and the beginnings of the names that cannot be told."""
    if isinstance(module, VisualTokenizerModule):
        return {name: tuple(value.shape) for name, value in module.state_dict().items()}, ()
    states: dict[str, Mapping[str, Tensor]] = {}
    unknown: list[str] = []
    with torch.device("meta"):
        model = M2Encoder(module.config)
        module.adaptation.apply(model)
        states["model."] = model.state_dict()
        for name, objective in module.trained_objectives().items():
            built, head = _copy(objective), f"objectives.{name}."
            try:
                built.build(module.config)
            except UserError:
                raise
            except Exception as error:  # a user's own may want values, which nothing has here; loading will tell
                logger.info("%s cannot be compared with the checkpoint before it is built (%s)", head[:-1], error)
                unknown.append(head)
            else:
                states[head] = built.state_dict()
    shapes = {f"{head}{name}": tuple(value.shape) for head, state in states.items() for name, value in state.items()}
    return shapes, tuple(unknown)


def _copy(objective: Objective) -> Objective:
    """Without copying the frozen models that it holds in tuples, which are no sub-modules."""
    values = (value for part in objective.modules() for value in vars(part).values() if isinstance(value, tuple))
    return copy.deepcopy(
        objective, {id(each): each for value in values for each in value if isinstance(each, nn.Module)}
    )


def _first_difference(
    there: Mapping[str, tuple[int, ...]], now: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """Name of a parameter, and what is wrong with it; other shapes come first, as they say most."""
    for name in now:
        if name in there and there[name] != now[name]:
            return name, f"{name} is {there[name]} there, {now[name]} now"
    for name in now:
        if name not in there:
            return name, f"it has no {name}"
    extra = next((name for name in there if name not in now), None)
    return None if extra is None else (extra, f"it has {extra}, which nothing here trains")
