"""Files of tensors, told apart by their first bytes and read without ever executing what they hold.

Two containers exist: what `torch.save` writes (a zip archive, or a bare pickle from old versions) and safetensors.
Whatever is wrong with a file becomes a `CheckpointError` of one line with its name.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from m2_encoder.checkpoints.digests import check_tensors
from m2_encoder.errors import CheckpointError, DamagedError

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_PROTOCOL = b"\x80"
_MAX_JSON_BYTES = 64 << 20
_DAMAGED = "damaged or not a checkpoint (torch cannot read it); copy or download it again"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def file_kind(path: str | os.PathLike[str]) -> str:
    """What kind of file: "zip" or "pickle" (both written by `torch.save`), "safetensors" or "json"; by its first bytes.

    Raises:
        DamagedError: for an empty or a foreign file.
        CheckpointError: for a missing file, or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a checkpoint file; give a file inside it")
    try:
        _check_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint file; check the path") from error
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from error
    if not head:
        raise DamagedError(f"{path}: the file is empty; copy or download it again")
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if head.lstrip().startswith(b"{") and b"\0" not in head:
        return "json"
    # A safetensors file starts with the length of its header (8 bytes), and the header is JSON.
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(_PICKLE_PROTOCOL):
        return "pickle"
    raise DamagedError(
        f"{path}: not a checkpoint; expected a file written by torch.save (.ckpt, .pt, .pth, .bin) or .safetensors"
    )


def read_torch(path: str | os.PathLike[str], *, mapped: bool = False) -> object:
    """Read what `torch.save` wrote, tensors on the CPU; code in it is refused, never executed.

    With `mapped`, tensors point into the file, so that only what is touched is read; only zips can be mapped.

    Raises:
        DamagedError: if the file is truncated.
        CheckpointError: if it holds anything but tensors and plain containers, or cannot be read.
    """
    try:
        with warnings.catch_warnings(), Path(path).open("rb") as file:
            # torch warns about old storage formats and archives of code.
            warnings.simplefilter("ignore")
            source: Any = os.fspath(path) if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen unrelated types for broken and hostile input
        reason = _torch_reason(error)
        is_short = isinstance(error, OSError | MemoryError) or "allocate" in str(error)  # of memory, or the disk fails
        kind = DamagedError if reason is _DAMAGED and not is_short else CheckpointError
        raise kind(f"{os.fspath(path)}: {reason}") from error


def _torch_reason(error: Exception) -> str:
    """One line for whatever torch said in twenty."""
    text = str(error)
    # The name of what the pickle asked for; a file that ends inside such a name gives an empty one.
    named = re.search(r"GLOBAL (\S*)", text)
    what = named.group(1).strip(".") if named else ""
    if what or (not named and ("Unsupported" in text or "TorchScript" in text)):
        return (
            f"refused, it holds more than tensors and plain containers{what and f' ({what})'}, and reading that "
            "could execute code; if you trust its source, save its state dict alone"
        )
    return _DAMAGED


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory of their own.

    The library would map the file instead: then the pages count twice once a copy is made, and a file that is
    overwritten later would change or crash the model.

    Raises:
        DamagedError: if the file is truncated, inconsistent, or carries a digest and has other bytes.
        CheckpointError: if it has a dtype that no checkpoint uses, or cannot be read.
    """
    name = os.fspath(path)
    try:
        # The library validates everything: header size, JSON, offsets without holes, the length of the file.
        with safetensors.safe_open(name, framework="pt"):
            pass
        with Path(path).open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
            metadata = header.pop("__metadata__", {})
            tensors = {key: _read_tensor(file, 8 + header_size, entry) for key, entry in header.items()}
        check_tensors(name, tensors, metadata)
        return tensors
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{name}: unsupported safetensors dtype {error}; save the weights as F32") from error
    except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
        kind = CheckpointError if isinstance(error, OSError) else DamagedError
        raise kind(
            f"{name}: damaged or not a safetensors file ({_first_line(error)}); copy or download it again"
        ) from error


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        CheckpointError: if the file is truncated or inconsistent.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{os.fspath(path)}: damaged or not a safetensors file ({_first_line(error)}); copy or download it again"
        ) from error


def read_small_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a regular file of at most 64 MiB.

    Raises:
        CheckpointError: if there is no such file, or something else is in it.
    """
    path = Path(path)
    try:
        _check_regular(path)
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB, no such file is; export it again")
        content = json.loads(text.decode("utf-8-sig"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged or edited, not readable as JSON ({_first_line(error)}); export the model again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object; export it again")
    return content


def _check_regular(path: Path) -> None:
    """Refuse what may never end: pipes and devices, and links to them.

    Raises:
        OSError: if there is nothing.
        CheckpointError: for something else than a file or a folder.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is no regular file (a pipe or a device); give a file")


def _read_tensor(file: BinaryIO, data_start: int, entry: dict[str, Any]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    file.seek(data_start + start)
    buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if file.readinto(buffer) != stop - start:  # type: ignore[attr-defined]  # BinaryIO from open("rb") has it
        raise ValueError("the file ends early")
    return tensor


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
