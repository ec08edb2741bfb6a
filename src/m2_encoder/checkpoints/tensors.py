"""Write safetensors files with ordinary permissions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a file with the permissions of any new file: safetensors itself lets nobody else read it."""
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the user's umask leaves
    safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata))
    os.chmod(path, mode)
