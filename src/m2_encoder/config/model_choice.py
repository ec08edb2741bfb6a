"""Which model and which tokenizer a configuration names: checking, building and loading them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.exported import (
    CONFIG_FILE,
    VISUAL_TOKENIZER_FORMAT,
    WEIGHTS_FILE,
    read_exported,
    read_format,
)
from m2_encoder.checkpoints.released import RELEASES, find_release, is_offline
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.config.foreign_model import constructor_node, towers_config
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import Unset
from m2_encoder.config.schema import is_foreign
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.models.onnx_model import find_graphs
from m2_encoder.hub import LoadedModel, find_name, list_models, load, read_tokenizer
from m2_encoder.models.config import NAME_TO_CONFIG, NUM_RESERVED_POSITIONS, M2EncoderConfig
from m2_encoder.models.two_towers import TowersConfig, TwoTowers
from m2_encoder.tokenizers.foreign import ForeignTokenizer
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_FIGURE_SUFFIXES: Final = (".png", ".svg", ".pdf")
_OUTPUTS: Final = ("output", "plot", "page")
EMBEDDED_TOKENIZER: Final = "emoji"
NO_ENCODER: Final = "is a visual tokenizer, not an encoder; give a folder that m2-export wrote"


def format_of(value: str) -> str | None:
    """The format of an exported folder, or of the one in a run's folder; None if it is neither."""
    folder = find_path(value)
    return read_format(folder) or read_format(folder / "export")


def model_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with `model`, `weights`, `tokenizer` and `device`, without loading anything."""
    problems: list[Problem] = []
    model, weights = cfg["model"], cfg["weights"]
    if not isinstance(model, Unset):
        if is_model_name(model):
            problems += _release_problems(model) if weights is None else ()
        elif not isinstance(model, str) or not find_path(model).is_dir():
            fix = f"give one that m2-export wrote, or one of {', '.join(list_models())} with weights="
            problems.append(Problem("model", model, "no such folder", fix))
        elif format_of(model) == VISUAL_TOKENIZER_FORMAT:
            problems.append(Problem("model", model, NO_ENCODER))
        elif not (find_path(model) / CONFIG_FILE).is_file() and (find_path(model) / "export").is_dir():
            inside = f"its model is in model={model.rstrip('/')}/export"
            problems.append(Problem("model", model, "is a run's folder", inside))
    for key in ("weights", "tokenizer"):
        value = cfg[key]
        if value is None or (key == "weights" and is_url(value)):
            continue
        path = find_path(value) if isinstance(value, str) else None
        if path is None or not (path.is_file() or (key == "weights" and path.is_dir())):
            problems.append(Problem(key, value, "no such file"))
    return [*problems, *_device_problems(cfg["device"])]


def _release_problems(model: str) -> list[Problem]:
    """Whether a name stands for released weights, and these are here, where nothing may be fetched."""
    name = find_name(model)
    if name is None or name not in RELEASES:
        return [Problem("model", model, "a named model needs its checkpoint", "add weights=FILE")]
    try:
        if is_offline():
            find_release(name)
    except UserError as error:
        return [Problem("model", model, error.text.removeprefix(f"{name}: "))]
    return []


def needs_tokenizer(cfg: Mapping[str, Any]) -> bool:
    """Whether texts need `tokenizer` beside `model`: a name of weights that are not those released under it."""
    if not is_model_name(cfg["model"]) or cfg["tokenizer"] is not None:
        return False
    return cfg["weights"] is not None or find_name(cfg["model"]) not in RELEASES


def build_model_config(model: Mapping[str, Any]) -> M2EncoderConfig:
    """The architecture that `model` names, with the fields that are not null on top.

    Where positions are stretched, their table grows with the context length.

    Raises:
        UserError: for an unknown name or an impossible combination.
    """
    fields = [field.name for field in dataclasses.fields(M2EncoderConfig) if field.name != "name"]
    overrides = {field: model[field] for field in fields if model.get(field) is not None}
    if model.get("stretch_positions") is not None and model["name"] in NAME_TO_CONFIG:
        least = (overrides.get("context_length") or 0) + NUM_RESERVED_POSITIONS
        overrides.setdefault("num_text_positions", max(least, NAME_TO_CONFIG[model["name"]].num_text_positions))
    return M2EncoderConfig.from_name(model["name"], **overrides)


def model_shape(model: Mapping[str, Any]) -> M2EncoderConfig | TowersConfig:
    """As `build_model_config`; what is known of somebody else's model before it is built.

    Raises:
        UserError: see there.
    """
    return towers_config(model) if is_foreign(model) else build_model_config(model)


def build_any_tokenizer(model: Mapping[str, Any]) -> SentencePieceTokenizer | ForeignTokenizer:
    """As `build_tokenizer`, or what `model.tokenizer._target_` names, for somebody else's model.

    Raises:
        UserError: see there; or if it makes no ids of texts.
    """
    if not isinstance(node := model["tokenizer"], Mapping):
        return build_tokenizer(model, model_shape(model))
    try:
        return ForeignTokenizer(instantiate(node), str(node["_target_"]))
    except UserError as error:
        raise error.under("model.tokenizer") from error


def build_towers(model: Mapping[str, Any], tokenizer: SentencePieceTokenizer | ForeignTokenizer) -> TwoTowers:
    """Somebody else's model, with the values of `model.weights` if that is given.

    Raises:
        UserError: if it is no model of two towers, or the weights are not its own.
    """
    node = constructor_node(model, vocab_size=tokenizer.vocab_size)
    text = tokenizer(["a cat", "一只猫"])
    try:
        towers = TwoTowers(
            functools.partial(instantiate, node),
            towers_config(model),
            text=text,
            pad_id=tokenizer.end_id if isinstance(tokenizer, SentencePieceTokenizer) else None,
        )
    except UserError as error:
        raise error.under("model") from error
    if model.get("weights") is not None:
        _load_weights(towers, str(model["weights"]))
    return towers


def _load_weights(towers: TwoTowers, name: str) -> None:
    path = find_path(name)
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        state = state.get("state_dict", state)
        if any(key.startswith("model.towers.") for key in state):  # of a checkpoint of a run
            state = {key.removeprefix("model.towers."): value for key, value in state.items()}
        towers.towers.load_state_dict({key: value for key, value in state.items() if isinstance(value, torch.Tensor)})
    except Exception as error:  # torch and safetensors raise a dozen unrelated types
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"is no state dict of {towers.config.name} ({said})", key="model.weights", value=name
        ) from error


def build_tokenizer(model: Mapping[str, Any], config: M2EncoderConfig | TowersConfig) -> SentencePieceTokenizer:
    """The tokenizer that `model.tokenizer` names, cutting texts at the model's context length.

    Raises:
        UserError: if the file is missing or no SentencePiece model.
    """
    name = str(model["tokenizer"])
    if name == EMBEDDED_TOKENIZER:
        return SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=config.context_length)
    path = find_path(name)
    if not path.is_file():
        fix = f"give `{EMBEDDED_TOKENIZER}` or the path of a SentencePiece model, such as the official sp.model"
        raise UserError(f"no such file; {fix}", key="model.tokenizer", value=name)
    return SentencePieceTokenizer(path, context_length=config.context_length)


def tokenizer_of(cfg: Mapping[str, Any]) -> SentencePieceTokenizer | None:
    """The tokenizer that `model`, `tokenizer` and `context_length` name, cutting texts as that model does.

    `model` is a folder that m2-export wrote, or a run's with such a folder in it, or a name; None if nothing is named.

    Raises:
        UserError: if there is none, or both are named.
    """
    model, tokenizer, length = cfg["model"], cfg["tokenizer"], cfg["context_length"]
    if model is None and tokenizer is None:
        return None
    if model is not None and not is_model_name(model):
        if tokenizer is not None:
            raise UserError("model has a tokenizer of its own; give one of them", key="tokenizer", value=tokenizer)
        folder = find_path(model)
        inside = folder / "export"
        try:
            exported = read_exported(inside if not (folder / CONFIG_FILE).exists() and inside.is_dir() else folder)
        except UserError as error:
            raise UserError(str(error), key="model", value=model) from error
        return read_tokenizer(exported, context_length=length)
    config = M2EncoderConfig() if model is None else M2EncoderConfig.from_name(model)
    if tokenizer is None:
        raise UserError("has no tokenizer with it; add tokenizer=FILE, such as sp.model", key="model", value=model)
    named = tokenizer == EMBEDDED_TOKENIZER or find_path(tokenizer).is_file()
    if not named:
        raise UserError("no such file", key="tokenizer", value=tokenizer)
    path = tokenizer if tokenizer == EMBEDDED_TOKENIZER else str(find_path(tokenizer))
    try:
        config = dataclasses.replace(config, context_length=length or config.context_length)
        return build_tokenizer({"tokenizer": path}, config)
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{find_path(path)}: "), key="tokenizer", value=tokenizer) from error


def load_from(cfg: dict[str, Any], *, adapter: Path | None = None) -> LoadedModel:
    """Loads the model that `model`, `weights`, `tokenizer`, `pictures` and `device` describe, with an adapter or none.

    Raises:
        UserError: as `m2_encoder.load`.
    """
    model = cfg["model"] if is_model_name(cfg["model"]) else find_path(cfg["model"])
    return load(model, adapter=adapter, **arguments_of_load(cfg))


def arguments_of_load(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `m2_encoder.load` beside the model: paths are found where the command was started."""
    weights, tokenizer = cfg["weights"], cfg["tokenizer"]
    return {
        "weights": weights if weights is None or is_url(weights) else find_path(weights),
        "tokenizer": None if tokenizer is None else find_path(tokenizer),
        "pictures": cfg["pictures"],
        "device": device_of(cfg["device"]),
    }


def weights_of(cfg: Mapping[str, Any]) -> tuple[str, Path]:
    """What `weights` names, or stands for where it is null, and the file; of a URL, a path where nothing is."""
    weights, name = cfg["weights"], find_name(cfg["model"])
    if weights is None and name is not None:
        path = find_release(name)
        return path.name, path
    weights = str(weights or find_path(cfg["model"]) / WEIGHTS_FILE)
    return weights, Path(weights) if is_url(weights) else find_weights(find_path(weights))


def is_model_name(model: object) -> bool:
    """Whether a value is a name of `list_models`, however it is spelt."""
    return find_name(model) is not None


def device_of(value: str) -> str:
    """What `auto` stands for on this machine."""
    if value != "auto":
        return value
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{rank}" if (rank := os.environ.get("LOCAL_RANK")) else "cuda"


def _device_problems(value: object) -> list[Problem]:
    if value == "auto" or isinstance(value, Unset):
        return []
    try:
        kind = torch.device(str(value)).type
    except RuntimeError:
        return [Problem("device", value, "no such kind of device", "choose auto, cpu, cuda, cuda:N or mps")]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        usable = ", ".join(name for name, there in available.items() if there)
        return [Problem("device", value, "this machine has none", f"choose auto or {usable}")]
    return []


def runtime_problems(cfg: Mapping[str, Any], *, of_index: str | None = None) -> list[Problem]:
    """What keeps the graphs of `runtime: onnx` from being used, without opening them; nothing of `torch`.

    Args:
        cfg: whose other keys are checked.
        of_index: the model of an index, where `model` is null.
    """
    if cfg["runtime"] != "onnx":
        return []
    problems = []
    if importlib.util.find_spec("onnxruntime") is None:
        fix = "install it with pip install 'm2-encoder[export]'"
        problems.append(Problem("runtime", "onnx", "needs an extra (onnxruntime)", fix))
    if cfg["device"] not in ("auto", "cpu"):
        problems.append(Problem("device", cfg["device"], "graphs run on the CPU alone", "leave it out"))
    model = cfg["model"] or of_index
    if is_model_name(model):
        fix = "export it with m2-export 'to=[native,onnx]', and give the folder as model="
        return [*problems, Problem("runtime", "onnx", f"{model} is a name, and graphs lie in a folder", fix)]
    given = [key for key in ("weights", "pictures") if cfg.get(key) is not None]
    problems += [Problem(key, cfg[key], "graphs have their own", "leave it out, or export with it") for key in given]
    try:
        find_graphs(find_path(str(model)))
    except UserError as error:
        problems.append(Problem("runtime", "onnx", error.text))
    return problems


def output_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """Whether the files `output`, `plot` and `page`, as far as a command has them, may be written."""
    given = [str(cfg[key]) for key in _OUTPUTS if cfg.get(key) is not None and not isinstance(cfg[key], Unset)]
    if len(given) > len({os.path.abspath(os.path.expanduser(each)) for each in given}):
        return [Problem(_OUTPUTS[-1], given[-1], "is given for two outputs", "choose another name")]
    return [problem for key in _OUTPUTS for problem in _check_output(key, cfg.get(key), cfg["overwrite"])]


def _check_output(key: str, value: object, overwrite: object) -> Iterator[Problem]:
    if value is None or isinstance(value, Unset):
        return
    path = Path(str(value)).expanduser()
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path(os.sep))
    if path.is_dir():
        yield Problem(key, value, "is a folder", "give the name of a file")
    elif path.exists() and overwrite is not True:
        yield Problem(key, value, "exists", "choose another name, or replace it with overwrite=true")
    elif not takes_files(folder):
        yield Problem(key, value, f"cannot be written, because {folder} is no folder that you may write to")
    if key == "plot" and path.suffix not in _FIGURE_SUFFIXES:
        yield Problem(key, value, f"must end in {', '.join(_FIGURE_SUFFIXES)}", "for example plot=plot.png")
    elif key == "plot" and importlib.util.find_spec("matplotlib") is None:
        yield Problem(key, value, "needs an extra", "install it with pip install 'm2-encoder[plot]'")


def takes_files(folder: Path) -> bool:
    """Tried, because to root every folder seems to be writable; nothing is left behind."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
