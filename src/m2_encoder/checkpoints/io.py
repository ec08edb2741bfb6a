"""Checkpoints in and out: any official wrapper, safetensors, and our own training checkpoints.

A checkpoint becomes a flat state dict under our names (`read_state`), which must match the model exactly
(`build_model`). Tensors move from the file into the model one at a time and are never held twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.checkpoints.digests import check_zip
from m2_encoder.checkpoints.formats import file_kind, read_safetensors, read_torch
from m2_encoder.checkpoints.positions import resize_image_positions
from m2_encoder.checkpoints.state_names import listed, to_our_names, unwrap
from m2_encoder.checkpoints.tensors import find_non_finite, write_tensors
from m2_encoder.checkpoints.weight_files import describe_shard, find_weights, read_index
from m2_encoder.errors import CheckpointError
from m2_encoder.files import atomic_file
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder

IMAGE_POSITIONS = "image_embed.positions.weight"
"""The one parameter whose shape follows the image size."""


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint under our names.

    The container is told apart by content, never by suffix. Of a training checkpoint that also holds an
    optimizer, only the parameters are read into memory.

    Args:
        path: a checkpoint of the official release in any of its wrappers, a safetensors file, the index of several
            (`model.safetensors.index.json`, with them beside it), one of our own training checkpoints, or the folder
            of an export or a run. What frameworks put before names is taken away (`state_names`); of plain and
            averaged weights (EMA) the plain ones are read.

    Returns:
        Parameter name to tensor (CPU, dtype of the file). Names that no row of the name table knows are kept
        as the file spells them, so that `build_model` can report them; documented extras (`IGNORED_NAMES`)
        are dropped.

    Raises:
        CheckpointError: if the file is missing, empty, foreign, truncated, damaged or unsafe, or holds no known
            parameter.
    """
    path = find_weights(path)
    kind = file_kind(path)
    if kind == "safetensors":
        return to_our_names(read_safetensors(path), path)
    if kind == "json":
        return to_our_names(read_index(path), path)
    # torch.load would hand a file of this suffix to the safetensors library when given its path.
    mappable = kind == "zip" and path.suffix != ".safetensors"
    state = to_our_names(unwrap(read_torch(path, mapped=mappable), path), path)
    if kind == "zip":
        check_zip(path)
    if not mappable:
        return state
    wanted = sum(_storage_bytes(tensor) for tensor in state.values())
    if 2 * wanted > path.stat().st_size:
        # Mostly parameters: read the file once into memory. Copies out of the mapping would count twice.
        del state
        return to_our_names(unwrap(read_torch(path), path, says=False), path, says=False)
    return {name: tensor if _is_expanded(tensor) else tensor.clone() for name, tensor in state.items()}


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_expanded(tensor: Tensor) -> bool:
    """True if a copy would be larger than what the file holds; it is only copied once its shape fits."""
    return tensor.layout != torch.strided or _storage_bytes(tensor) > tensor.untyped_storage().nbytes()


def build_model(
    config: M2EncoderConfig,
    state: dict[str, Tensor],
    *,
    source: str = "the checkpoint",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[M2Encoder], None] | None = None,
) -> M2Encoder:
    """Build a model around the tensors of a checkpoint.

    Args:
        config: the architecture.
        state: parameters under our names, as `read_state` returns them. Emptied on the way: a tensor is
            converted and its source released before the next one.
        source: what error messages call the checkpoint; usually its path.
        device: where the model shall live.
        dtype: floating point type of all its parameters.
        prepare: gives a plain model the parameters of the checkpoint, where it has others.

    Returns:
        The model in eval mode, its parameters requiring gradients.

    Raises:
        CheckpointError: if a parameter is not finite, missing, unexpected or of another shape; all of them are counted
            and the first ones named. An image position table of another square grid is resized.
    """
    with torch.device("meta"):
        model = M2Encoder(config)
        if prepare is not None:
            prepare(model)
    expected = model.state_dict()
    _fit_image_positions(state, expected[IMAGE_POSITIONS], source)
    _check_match(state, expected, source=source, model_name=config.name)
    taken: set[int] = set()
    loaded = {name: _owned(state.pop(name), taken, device=torch.device(device), dtype=dtype) for name in expected}
    if (broken := find_non_finite(loaded)) is not None:
        raise CheckpointError(f"{source}: {broken} holds values that are NaN or infinite; take an earlier checkpoint")
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval()


def load_model(
    config: M2EncoderConfig,
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[M2Encoder], None] | None = None,
) -> M2Encoder:
    """`read_state` and `build_model` in one call; peak memory is about one copy of the weights.

    Raises:
        CheckpointError: see both.
    """
    return build_model(config, read_state(path), source=os.fspath(path), device=device, dtype=dtype, prepare=prepare)


def _fit_image_positions(state: dict[str, Tensor], expected: Tensor, source: str) -> None:
    table = state.get(IMAGE_POSITIONS)
    if table is None or table.dim() != 2 or table.shape[1] != expected.shape[1] or not table.is_floating_point():
        return  # left for the comparison of names and shapes to report
    try:
        state[IMAGE_POSITIONS] = resize_image_positions(table, expected.shape[0])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _check_match(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, model_name: str) -> None:
    """One error for everything that keeps a state dict from being this model's."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    unusable = [
        f"{name} is {_unusable_kind(state[name])}" for name in expected if name in state and _unusable_kind(state[name])
    ]
    problems = [
        f"{len(found)} {what} ({listed(found, separator=separator)})"
        for found, what, separator in (
            (missing, "missing", ", "),
            (unexpected, "unexpected", ", "),
            (shapes, "of another shape", "; "),
            (unusable, "unusable", "; "),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{source}: does not fit model {model_name!r} of {len(expected)} parameters: {', '.join(problems)}"
            f"{describe_shard(Path(source)) if missing else ''}{_name_size(state) if shapes else ''}"
        )


def _name_size(state: Mapping[str, Tensor]) -> str:
    """Which of our models a state dict has the size of."""
    table = state.get("text_embed.tokens.weight")
    layers = {name.split(".")[2] for name in state if name.startswith("backbone.layers.")}
    size = (None if table is None else table.shape[-1], len(layers))
    fitting = [name for name, config in NAME_TO_CONFIG.items() if (config.embed_dim, config.num_layers) == size]
    return f"; the weights are of the size of {fitting[0]!r}: choose that model" if fitting else ""


def _unusable_kind(tensor: Tensor) -> str:
    """Why a tensor cannot be a parameter; empty if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized, expected a plain tensor"
    if tensor.device.type == "meta":
        return "without data (on the meta device)"
    return "" if tensor.is_floating_point() else f"{tensor.dtype}, expected floating point"


def _owned(tensor: Tensor, taken: set[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor that shares its storage with nothing and wastes none of it.

    Tied parameters would otherwise train together, and a small view would keep the whole storage behind it
    alive.
    """
    converted = tensor.detach().to(device=device, dtype=dtype).contiguous()
    storage = converted.untyped_storage()
    if storage.data_ptr() in taken or storage.nbytes() != _storage_bytes(converted):
        converted = converted.clone()
    taken.add(converted.untyped_storage().data_ptr())
    return converted


def save_official(model: M2Encoder, path: str | os.PathLike[str]) -> None:
    """Write the format of the official release: a torch file with the official names under `state_dict`.

    The file appears whole or not at all. Tensors keep their dtype.

    Raises:
        CheckpointError: if the file cannot be written, or the model has added parts, which that format has not.
    """
    if model.config.num_prompts or model.config.adapter_width or model.config.mixture_copies:
        rule = "the official format has no prompts or adapters, and no mixtures"
        raise CheckpointError(f"{rule}; use save_safetensors or export_model")
    state = to_official_state(_portable_state(model))
    with atomic_file(path, error=CheckpointError) as temporary:
        torch.save({"state_dict": state}, temporary)


def save_safetensors(
    model: M2Encoder, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the parameters under our names in fp32, whole or not at all.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    state = {name: tensor.float() for name, tensor in _portable_state(model).items()}
    with atomic_file(path, error=CheckpointError) as temporary:
        write_tensors(state, temporary, metadata=metadata or {})


def _portable_state(model: M2Encoder) -> dict[str, Tensor]:
    """The state dict on the CPU, every tensor with a storage of its own size."""
    state = model.state_dict()
    empty = sum(tensor.device.type == "meta" for tensor in state.values())
    if empty:
        raise CheckpointError(
            f"cannot save a model without data: {empty} parameters are on the meta device; call "
            "to_empty() and init_weights(), or load a checkpoint"
        )
    taken: set[int] = set()
    return {
        name: _owned(tensor, taken, device=torch.device("cpu"), dtype=tensor.dtype) for name, tensor in state.items()
    }
