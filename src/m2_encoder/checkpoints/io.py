"""Checkpoints in and out: any official wrapper, safetensors, and our own training checkpoints.

A checkpoint becomes a flat state dict under our names (`read_state`), which must match the model exactly
(`build_model`). Tensors move from the file into the model one at a time and are never held twice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from m2_encoder.checkpoints.adapters import IGNORED_NAMES, official_to_ours, ours_to_official, to_official_state
from m2_encoder.checkpoints.formats import file_kind, read_safetensors, read_torch
from m2_encoder.checkpoints.positions import resize_image_positions
from m2_encoder.checkpoints.tensors import write_tensors
from m2_encoder.errors import CheckpointError
from m2_encoder.files import atomic_file
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder

IMAGE_POSITIONS = "image_embed.positions.weight"
"""The one parameter whose shape follows the image size."""

WRAPPERS = ("state_dict", "module", "model")
"""Keys under which a checkpoint may hold its state dict; the first one present counts."""

NAME_PREFIXES = ("_forward_module.", "model.")
"""What training frameworks put before a parameter's name: DeepSpeed, and our training module."""

_MAX_LISTED = 4


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint under our names.

    The container is told apart by content, never by suffix. Of a training checkpoint that also holds an
    optimizer, only the parameters are read into memory.

    Args:
        path: a checkpoint of the official release in any of its wrappers, a safetensors file, or one of our
            own training checkpoints.

    Returns:
        Parameter name to tensor (CPU, dtype of the file). Names that no row of the name table knows are kept
        as the file spells them, so that `build_model` can report them; documented extras (`IGNORED_NAMES`)
        are dropped.

    Raises:
        CheckpointError: if the file is missing, empty, foreign, truncated or unsafe, or holds no known
            parameter.
    """
    path = Path(path)
    if file_kind(path) == "safetensors":
        return _to_our_names(read_safetensors(path), path)
    # torch.load would hand a file of this suffix to the safetensors library when given its path.
    mappable = file_kind(path) == "zip" and path.suffix != ".safetensors"
    state = _to_our_names(_unwrap(read_torch(path, mapped=mappable), path), path)
    if not mappable:
        return state
    wanted = sum(_storage_bytes(tensor) for tensor in state.values())
    if 2 * wanted > path.stat().st_size:
        # Mostly parameters: read the file once into memory. Copies out of the mapping would count twice.
        del state
        return _to_our_names(_unwrap(read_torch(path), path), path)
    return {name: tensor if _is_expanded(tensor) else tensor.clone() for name, tensor in state.items()}


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, checked to be one."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    state = content if wrapper is None else content[wrapper]
    where = "it" if wrapper is None else f"its {wrapper!r}"
    if not state:
        raise CheckpointError(f"{path}: holds no parameters ({where} is empty)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_nested:
            raise CheckpointError(
                f"{path}: not a state dict: {where} has {type(value).__name__} under {str(name)[:80]!r}, "
                "expected names and tensors only"
            )
    return dict(state)


def _to_our_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename, and drop documented extras."""
    renamed: dict[str, Tensor] = {}
    num_known = 0
    for name, tensor in state.items():
        bare = functools.reduce(str.removeprefix, NAME_PREFIXES, name)
        if any(extra in bare for extra in IGNORED_NAMES):
            continue
        ours = our_name(bare)
        num_known += ours is not None
        ours = ours or bare
        if ours in renamed:
            raise CheckpointError(f"{path}: two of its entries mean {ours!r} (one is {name!r}); keep one of them")
        renamed[ours] = tensor
    if not num_known:
        raise CheckpointError(
            f"{path}: not an M2-Encoder checkpoint: none of its {len(state)} names is known ({_listed(state)})"
        )
    return renamed


def our_name(name: str) -> str | None:
    """Our name of a parameter in the official spelling or in ours; None for anything else."""
    return official_to_ours(name) or (name if ours_to_official(name) else None)


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
        CheckpointError: if a parameter is missing, unexpected or of another shape; all of them are counted
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
        f"{len(found)} {what} ({_listed(found, separator=separator)})"
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
        )


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


def _listed(names: Iterable[str], *, separator: str = ", ") -> str:
    names = list(names)
    shown = separator.join(name[:160] for name in names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown}{separator}and {len(names) - _MAX_LISTED} more"


def save_official(model: M2Encoder, path: str | os.PathLike[str]) -> None:
    """Write the format of the official release: a torch file with the official names under `state_dict`.

    The file appears whole or not at all. Tensors keep their dtype.

    Raises:
        CheckpointError: if the file cannot be written.
    """
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
