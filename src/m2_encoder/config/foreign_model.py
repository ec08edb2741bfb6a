"""`model._target_`: a model of two towers that is somebody else's, with the keys of `model` that are not its own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

from m2_encoder.config.check import Parameters, check_targets, check_values, read_parameters
from m2_encoder.config.problems import UNSET
from m2_encoder.config.schema import ForeignModel, is_foreign
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.two_towers import TowersConfig
from m2_encoder.tokenizers.sentencepiece_tokenizer import OFFICIAL_CONTEXT_LENGTH

_HYDRA: Final = ("_target_", "_convert_", "_recursive_")
_PASSED: Final = ("image_size", "context_length", "vocab_size")
"""What the constructor gets of the command, if it names it."""

_SIZES: Final = tuple(field.name for field in dataclasses.fields(M2EncoderConfig))
"""Of M2-Encoder; an experiment may set them, whichever model is chosen."""


def check_model(model: Any) -> Iterator[Problem]:
    """What is wrong with such a node; nothing is said of another one."""
    if not is_foreign(model) or model["_target_"] is UNSET:
        return
    try:
        called = find_target(str(model["_target_"]))
    except TargetError as error:
        yield Problem("model._target_", model["_target_"], error.rule, error.fix)
        return
    own = read_parameters(ForeignModel)
    if model.get("image_size") is None:
        yield Problem("model.image_size", NOTHING, "is missing", "add model.image_size=N, the side of its images")
    yield from check_values("model", {key: value for key, value in model.items() if key in own}, own)
    if isinstance(tokenizer := model.get("tokenizer"), Mapping):
        if "_target_" not in tokenizer:
            yield Problem("model.tokenizer", dict(tokenizer), "must have a _target_, or be a text", "give a file")
        yield from check_targets(tokenizer, given={}, path="model.tokenizer")
    elif not isinstance(tokenizer, str) and tokenizer is not UNSET and "tokenizer" in model:
        fix = "give `emoji`, a SentencePiece file, or a node with a _target_"
        yield Problem("model.tokenizer", tokenizer, "must be a text, or a node", fix)
    if not callable(called):
        yield Problem("model._target_", model["_target_"], "must be the dotted name of a class or function")
        return
    parameters = read_parameters(called)
    arguments = {key: value for key, value in _arguments(model, parameters).items() if key not in _HYDRA}
    given = [name for name in _PASSED if name in parameters and name not in arguments]
    yield from check_values("model", arguments, parameters, given=given, name=str(model["_target_"]))
    for value_key, value in arguments.items():
        yield from check_targets(value, given={}, path=f"model.{value_key}")


def constructor_node(model: Mapping[str, Any], *, vocab_size: int | None) -> dict[str, Any]:
    """The node that builds the module, with what the command gives it; `vocab_size` is None if it is not known.

    Raises:
        UserError: if it is not, and the constructor needs it.
    """
    parameters = read_parameters(find_target(str(model["_target_"])))
    node = _arguments(model, parameters)
    given = {"image_size": model["image_size"], "context_length": context_length_of(model), "vocab_size": vocab_size}
    node |= {key: value for key, value in given.items() if key in parameters and key not in node and value is not None}
    lacks = "vocab_size" in parameters and "vocab_size" not in node
    if lacks and parameters["vocab_size"].default is inspect.Parameter.empty:
        raise UserError(
            "is missing, and the tokenizer does not say it; add +model.vocab_size=N", key="model.vocab_size"
        )
    return {"_convert_": "all", **node}  # its settings are plain values


def left_out(model: Mapping[str, Any]) -> list[str]:
    """Sizes of M2-Encoder with a value that say nothing of this model, such as those of an experiment."""
    used = {*_arguments(model, read_parameters(find_target(str(model["_target_"])))), *read_parameters(ForeignModel)}
    return [key for key, value in model.items() if key in _SIZES and value is not None and key not in used]


def context_length_of(model: Mapping[str, Any]) -> int:
    """Most tokens of a text."""
    return int(model.get("context_length") or OFFICIAL_CONTEXT_LENGTH)


def towers_config(model: Mapping[str, Any]) -> TowersConfig:
    """What is known of the model before it is built."""
    own = ("image_size", "context_length", "name", *read_parameters(ForeignModel))
    means = {key: None if model.get(key) is None else tuple(model[key]) for key in ("pixel_mean", "pixel_std")}
    return TowersConfig(
        name=str(model.get("name") or str(model["_target_"]).rpartition(".")[2]),
        image_size=int(model["image_size"]),
        context_length=context_length_of(model),
        arguments={key: value for key, value in model.items() if key not in (*own, *_SIZES)},
        pixel_mean=means["pixel_mean"],
        pixel_std=means["pixel_std"],
    )


def _arguments(model: Mapping[str, Any], parameters: Parameters) -> dict[str, Any]:
    """What of the node goes to the constructor: what it names, and what nobody else knows."""
    own = read_parameters(ForeignModel)
    named = {name for name, item in parameters.items() if item.kind is not inspect.Parameter.VAR_KEYWORD}
    return {
        key: value
        for key, value in model.items()
        if (key not in own and key not in _SIZES) or (key in named and key not in own and value is not None)
    }
