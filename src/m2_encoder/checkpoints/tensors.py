"""Write safetensors files with a digest and ordinary permissions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from m2_encoder.checkpoints.digests import DIGEST_KEY, digest_tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a file with its digest, and with the permissions of any new file: safetensors lets nobody else read it.

    Args:
        tensors: contiguous, on the CPU.
        path: replaced.
        metadata: of the file, beside the digest.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the user's umask leaves
    safetensors.torch.save_file(dict(tensors), path, metadata={**metadata, DIGEST_KEY: digest_tensors(tensors)})
    os.chmod(path, mode)
