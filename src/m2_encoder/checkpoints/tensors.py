"""Write safetensors files with a digest and ordinary permissions."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from m2_encoder.checkpoints.digests import DIGEST_KEY, digest_tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a file with its digest, and with the permissions of any new file: safetensors lets nobody else read it.

    Args:
        tensors: contiguous, on the CPU.
        path: replaced.
        metadata: of the file, beside the digest.

    Raises:
        OSError: if the disk refuses.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the user's umask leaves
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={**metadata, DIGEST_KEY: digest_tensors(tensors)})
    except safetensors.SafetensorError as error:  # an error of its own, in words, for a full disk
        code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(code, " ".join(str(error).split()), str(path)) from error
    _sort_metadata(path)
    os.chmod(path, mode)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order of their names: safetensors writes them in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(content) <= length, "the same characters in another order"
        file.seek(8)
        file.write(content.ljust(length))


def find_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite; None if there is none.

    It takes no memory beside the tensors, floating or not, of any device but `meta`.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            least, most = tensor.detach().aminmax()  # which hand a NaN on
            if not bool(least.isfinite() & most.isfinite()):
                return name
    return None
