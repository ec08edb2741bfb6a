"""`load`: from a name, a configuration or an exported folder to a model that is ready to use."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from m2_encoder.checkpoints.download import download, is_url, removing_damaged
from m2_encoder.checkpoints.exported import CONFIG_FILE, ExportedFolder, find_pictures, read_exported
from m2_encoder.checkpoints.io import build_model, read_state
from m2_encoder.checkpoints.peft_files import merge_adapter_of
from m2_encoder.checkpoints.positions import stretch_text_positions
from m2_encoder.checkpoints.released import RELEASES, find_release, find_release_tokenizer
from m2_encoder.checkpoints.vocabulary import fit_vocabulary
from m2_encoder.checkpoints.weight_files import check_download, find_weights
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.pictures import OFFICIAL, STANDARD, PicturePolicy, read_policy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MissingTokenizer:
    """What `load` returns without a tokenizer: raises an error that says what to give.

    Args:
        reason: why that of released weights was not found; empty for other weights.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Raises the error."""
        raise UserError(
            self.reason
            or "no tokenizer was given; pass the SentencePiece file that belongs to the weights: "
            'load(..., tokenizer="sp.model")'
        )

    def __repr__(self) -> str:
        return "MissingTokenizer()"


class LoadedModel(NamedTuple):
    """What `load` returns; unpacks as `model, preprocess, tokenizer`."""

    model: M2Encoder  # in evaluation mode
    preprocess: EvalTransform  # a PIL image, array or path to (3, S, S) float32 in 0..1
    tokenizer: SentencePieceTokenizer | MissingTokenizer  # texts to token ids and mask

    def require_tokenizer(self) -> SentencePieceTokenizer:
        """The tokenizer.

        Raises:
            UserError: if there is none, with what to give.
        """
        return self.tokenizer() if isinstance(self.tokenizer, MissingTokenizer) else self.tokenizer


def list_models() -> list[str]:
    """Names that `load` and `M2EncoderConfig.from_name` know, smallest first."""
    return list(NAME_TO_CONFIG)


def find_name(model: object) -> str | None:
    """The name of `list_models()` that a text spells, with underscores or otherwise; None if it is none."""
    known = {_canonical(name): name for name in NAME_TO_CONFIG}
    return known.get(_canonical(model)) if isinstance(model, str) else None


def load(
    model: str | os.PathLike[str] | M2EncoderConfig,
    *,
    checkpoint: str | int | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    tokenizer: SentencePieceTokenizer | str | os.PathLike[str] | bytes | None = None,
    image_size: int | None = None,
    pictures: PicturePolicy | str | Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    map_tokenizer: bool | str | os.PathLike[str] = False,
    stretch_positions: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a model with everything needed to use it.

    Args:
        model: a name of `list_models()` (underscores work, too), a configuration, or a folder written by
            `m2-export`, which has its own weights and tokenizer, or a run's folder with such an export in it. A name
            wins over a folder of that name; write `./name` then.
        checkpoint: of a run's folder, in place of its export: a step, a name such as `step=500`, `last`, or a path.
        weights: a checkpoint: any wrapper of the official format, safetensors, or one of our training
            checkpoints; a path or an http(s) URL. A URL is downloaded once to `~/.cache/m2_encoder` (or
            `M2_ENCODER_CACHE`) and may end in `#sha256=...`. None, with a name of released weights, looks for these and
            for their tokenizer, here and then at hubs, see `checkpoints.released`; no network is used otherwise.
        tokenizer: a SentencePiece file, its bytes, or a tokenizer; not needed for images.
        image_size: pixels; if it differs from the model's, the position table is resized and `preprocess` follows.
        pictures: what `preprocess` makes of orientation, alpha and 16-bit levels: a policy, its name (`standard`,
            `official`, `older`) or values. By default as the model was trained: what its export says (`older` where
            it says nothing), `official` for official names and configurations, else `standard`.
        device: of the model.
        dtype: of all parameters.
        trainable: whether parameters require gradients.
        map_tokenizer: False refuses a tokenizer that is not the weights' own; True gives its pieces their rows (new
            ones: the mean of what they split into); a file is that of weights that do not hold it, as official ones.
        stretch_positions: how many positions of the weights stay, where those of longer texts are stretched.
        adapter: folder of a low-rank adapter of ours or of peft's, to merge; ours are refused by other weights.

    Raises:
        UserError: for an unknown name, a missing or unusable file, or an impossible option. None gets random weights.
    """
    if checkpoint is not None:
        _refuse_beside(checkpoint, weights, tokenizer, image_size, adapter, map_tokenizer or None)
        return _load_checkpoint(model, checkpoint, pictures, _checked_device(device), _checked_dtype(dtype), trainable)
    config, exported = _resolve(model)
    config = config if image_size is None else dataclasses.replace(config, image_size=image_size)
    # Checks come first, because weights may be a long download.
    policy = read_policy(pictures) if pictures is not None else choose_pictures(config, weights, exported)
    device, dtype = _checked_device(device), _checked_dtype(dtype)
    if map_tokenizer and tokenizer is None:
        raise UserError("map_tokenizer: there is no tokenizer to map the weights to; add tokenizer=FILE")
    text, path = _find_files(config, tokenizer, weights, exported)
    with removing_damaged(path):
        state = read_state(path)
    state = state if adapter is None else merge_adapter_of(state, adapter)
    if exported is None or weights is not None or tokenizer is not None or stretch_positions is not None:
        config = _fit_text(config, state, text, path, map_tokenizer, stretch_positions)
    encoder = build_model(config, state, source=os.fspath(path), device=device, dtype=dtype)
    return LoadedModel(encoder.requires_grad_(trainable), EvalTransform(config.image_size, pictures=policy), text)


class _Tower(nn.Module):
    """A tower of a model of ours, as a part of `models.composed.ComposedTowers`.

    Args:
        model: as `load` takes it, such as a folder written by `m2-export`.
        weights: as `load` takes it.
    """

    def __init__(self, model: str, weights: str | None = None) -> None:
        super().__init__()
        self.encoder = load(model, weights=weights, trainable=True).model


class TextTower(_Tower):
    """The text tower; arguments as of `_Tower`."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L2-normalised features, (B, E), of ids, (B, T), with True on tokens in the mask, (B, T)."""
        return self.encoder.encode_text(ids, mask)


class ImageTower(_Tower):
    """The image tower; arguments as of `_Tower`."""

    def forward(self, images: Tensor) -> Tensor:
        """L2-normalised features, (B, E), of images, (B, 3, S, S), in 0..1."""
        return self.encoder.encode_image(images)


def _refuse_beside(checkpoint: object, *given: object) -> None:
    if any(each is not None for each in given):
        raise UserError(f"checkpoint={checkpoint!r} has weights and a tokenizer of its own; give no others")


def _fit_text(
    config: M2EncoderConfig,
    state: dict[str, Tensor],
    text: object,
    path: Path,
    mapped: bool | str | os.PathLike[str],
    stretched: int | None,
) -> M2EncoderConfig:
    """Hold the token table against a tokenizer, or make it follow it; stretch positions if that is asked for."""
    if stretched is not None:
        stretch_text_positions(state, config, keep=stretched, weights=path)
    if not isinstance(text, SentencePieceTokenizer):
        return config
    fit_vocabulary(state, text, weights=path, mapped=mapped)
    return dataclasses.replace(config, vocab_size=text.vocab_size) if mapped else config


def _find_files(
    config: M2EncoderConfig, tokenizer: Any, weights: str | os.PathLike[str] | None, exported: ExportedFolder | None
) -> tuple[SentencePieceTokenizer | MissingTokenizer, Path]:
    """Tokenizer and weights; released weights come with theirs."""
    text = _build_tokenizer(config, tokenizer, exported)
    path = _weights_path(config, weights, exported)
    if weights is None and exported is None and tokenizer is None:
        try:
            text = _build_tokenizer(config, find_release_tokenizer(config.name, path), None)
        except CheckpointError as error:
            text = MissingTokenizer(error.text)
    return text, path


def _load_checkpoint(folder: object, checkpoint: object, pictures: object, *places: object) -> LoadedModel:
    # Runs are of a higher layer: only who asks for a checkpoint of one loads what that takes.
    opening = importlib.import_module("m2_encoder.runs.opening")
    device, dtype, trainable = places
    loaded: LoadedModel = opening.load_checkpoint(folder, checkpoint, pictures=pictures, device=device, dtype=dtype)
    loaded.model.requires_grad_(bool(trainable))
    return loaded


def choose_pictures(
    config: M2EncoderConfig, weights: str | os.PathLike[str] | None, exported: ExportedFolder | None = None
) -> PicturePolicy:
    """What the pixels were that a model was trained with.

    Args:
        config: its architecture; those with official weights are taken for these.
        weights: a checkpoint; None for those of `exported`, or none.
        exported: the folder that the model was loaded from.

    Raises:
        CheckpointError: if the export of the weights is damaged.
    """
    if (
        isinstance(weights, str | os.PathLike)
        and not is_url(weights)
        and (found := find_pictures(find_weights(weights))) is not None
    ):
        return found
    if exported is not None:
        return exported.pictures
    return OFFICIAL if config.name in (*RELEASES, "official") else STANDARD


def read_tokenizer(exported: ExportedFolder, *, context_length: int | None = None) -> SentencePieceTokenizer:
    """The tokenizer of an exported folder, with its context length or another one.

    Exports that are older than `normalise` read texts as they were trained; the one that comes with the package never
    saw a caption that `normalise` would change, so it takes it up.
    """
    normalise = exported.normalise
    if normalise is None:
        normalise = exported.tokenizer.read_bytes() == load_emoji_tokenizer_model()
    return SentencePieceTokenizer(
        exported.tokenizer,
        context_length=context_length or exported.context_length,
        truncation_side=exported.truncation_side,
        normalise=normalise,
    )


def _resolve(model: object) -> tuple[M2EncoderConfig, ExportedFolder | None]:
    """The architecture, and the export it came from, if any."""
    if isinstance(model, M2EncoderConfig):
        return model, None
    if not isinstance(model, str | os.PathLike):
        raise UserError(
            f"model={model!r:.80} is no model; expected a name ({', '.join(NAME_TO_CONFIG)}), an "
            "M2EncoderConfig, or a folder written by m2-export"
        )
    if (known := find_name(model)) is not None:
        return NAME_TO_CONFIG[known], None
    name = os.fspath(model)
    path = Path(name)
    if name and path.is_dir():  # the empty name would be the current folder
        inside = path / "export"
        if (path / "checkpoints").is_dir() and not inside.is_dir() and not (path / CONFIG_FILE).exists():
            fix = 'load(..., checkpoint="last") takes a checkpoint, m2-export run.name=NAME writes an export'
            raise UserError(f"{path}: this run has no export; {fix}")
        exported = read_exported(inside if not (path / CONFIG_FILE).exists() and inside.is_dir() else path)
        return exported.config, exported
    if path.is_file():
        raise UserError(
            f"{name} is a file; name its architecture and pass it as weights, e.g. load('tiny', weights={name!r})"
        )
    if os.sep in name:
        raise UserError(f"no such folder: {name}; expected one written by m2-export (config.json, model.safetensors)")
    raise UserError(
        f"unknown model {name!r}; known: {', '.join(NAME_TO_CONFIG)}; or give a folder written by m2-export"
    )


def _canonical(name: str) -> str:
    """The same for all spellings of a name, such as `m2-encoder-0.4b` and `m2_encoder_0_4b` of configuration files."""
    return re.sub(r"[-_.]+", "_", name.lower())


def _weights_path(
    config: M2EncoderConfig, weights: str | os.PathLike[str] | None, exported: ExportedFolder | None
) -> Path:
    if weights is not None:
        if not isinstance(weights, str | os.PathLike):
            raise UserError(f"weights={weights!r:.80} is no file; expected a path or a URL")
        if isinstance(weights, str) and is_url(weights):
            return download(weights, check=check_download)
        return Path(weights)
    if exported is not None:
        return exported.weights
    if config.name in RELEASES:
        return find_release(config.name)
    what = "pass weights=<checkpoint>, or load the folder of a trained model"
    raise UserError(f"no weights given for {config.name!r}: {what}. A model with random weights is M2Encoder(config)")


def _build_tokenizer(
    config: M2EncoderConfig, tokenizer: Any, exported: ExportedFolder | None
) -> SentencePieceTokenizer | MissingTokenizer:
    if isinstance(tokenizer, SentencePieceTokenizer):
        built = tokenizer
    elif tokenizer is not None:
        built = SentencePieceTokenizer(tokenizer, context_length=config.context_length)
    elif exported is not None:
        built = read_tokenizer(exported)
    else:
        return MissingTokenizer()
    return built


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(map(str, _DTYPES))}")
    return dtype


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"device={device!r} cannot be used: {reason}; try 'cpu'") from error
    if checked.type == "meta":
        raise UserError("device='meta' holds no weights; build M2Encoder(config) under torch.device('meta')")
    return checked
