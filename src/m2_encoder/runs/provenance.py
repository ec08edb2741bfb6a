"""Facts about a run that somebody will ask for later."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from m2_encoder.config.paths import PACKAGE_FOLDER

_PACKAGES = (
    "m2-encoder", "torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pillow", "safetensors", "sentencepiece",
)  # fmt: skip


def git_revision() -> str | None:
    """Commit of the code that runs, with "-dirty" if files differ from it; None outside of a checkout."""
    checkout = PACKAGE_FOLDER.parents[1]
    try:
        if Path(_git(checkout, "rev-parse", "--show-toplevel")) != checkout:
            return None  # installed into an environment that lies inside somebody else's repository
        revision = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpus": gpus}


def command_line() -> str:
    """The command as it was typed, ready for a shell; without the settings that commands add for Hydra."""
    typed = [argument for argument in sys.argv[1:] if not argument.startswith(("hydra.", "hydra/"))]
    return shlex.join([Path(sys.argv[0]).name, *typed])


def peak_memory_bytes() -> dict[str, int]:
    """Most memory that was in use at once: of this process, of its largest child, of each GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "largest_child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()
