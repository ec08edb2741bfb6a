"""Every objective is made once in vain, so that what its own code refuses is said before anything starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from m2_encoder.config.known import Known
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.config.objective_relations import counting
from m2_encoder.config.problems import find_problems
from m2_encoder.config.schema import MODEL_FIELDS
from m2_encoder.errors import NotGivenError, Problem, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.patch_targets import PatchTargets


def _try_objectives(known: Known) -> Iterator[Problem]:
    chosen = [name for name in counting(known) if known.is_complete(f"objective.{name}")]
    shape = _read_shape(known)
    for name in chosen:
        key, node = f"objective.{name}", known(f"objective.{name}")
        targets = node.get("targets")
        try:
            if isinstance(targets, Mapping) and not isinstance(_make(targets), PatchTargets):
                fix = "name a subclass of m2_encoder.objectives.patch_targets.PatchTargets"
                yield Problem(f"{key}.targets._target_", targets["_target_"], "makes no targets of patches", fix)
            elif not isinstance(_make(node, shape), Objective):
                fix = "name a subclass of m2_encoder.objectives.base.Objective"
                yield Problem(f"{key}._target_", node["_target_"], "makes no objective", fix)
        except UserError as error:
            yield from find_problems(error.under(key))


def _read_shape(known: Known) -> M2EncoderConfig:
    """The model's; the check ends here if a part of it is not known."""
    fields = {field: known(f"model.{field}") for field in MODEL_FIELDS if known.has(f"model.{field}")}
    return build_model_config({"name": known("model.name"), **fields})


def _make(node: Mapping[str, Any], shape: M2EncoderConfig | None = None) -> Any:
    """What a node makes, built for a model if it is an objective.

    Tensors on the meta device take no memory, but cannot be looked into: code that does is tried on the CPU.

    Raises:
        UserError: as the constructor and `build`.
    """
    with torch.random.fork_rng(devices=[]):
        with contextlib.suppress(Exception), torch.device("meta"):
            return _make_here(node, shape)
        return _make_here(node, shape)


def _make_here(node: Mapping[str, Any], shape: M2EncoderConfig | None) -> Any:
    try:
        made = instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
    if isinstance(made, Objective) and shape is not None:
        # What needs a teacher or a tokenizer gets it, and is checked with it, when the run is built.
        with contextlib.suppress(NotGivenError):
            made.build(shape)
    return made


TRIAL_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (_try_objectives,)
