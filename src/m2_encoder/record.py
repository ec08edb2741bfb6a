"""Facts about a run that are recorded in every file that a command writes."""

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

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "m2-encoder", "torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pillow", "safetensors", "sentencepiece",
)  # fmt: skip


def describe_run() -> dict[str, Any]:
    """Peak memory, revision of the code, versions, machine and command, as JSON takes them.

    `peak_memory_bytes` is of this process, of its largest child, and of each GPU. `git_revision` ends in "-dirty" if
    files differ from the commit, and is None outside of a checkout. `command` is ready for a shell, without Hydra's
    settings.
    """
    typed = [argument for argument in sys.argv[1:] if not argument.startswith(("hydra.", "hydra/"))]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "peak_memory_bytes": _peak_memory_bytes(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpus": gpus},
        "command": shlex.join([Path(sys.argv[0]).name, *typed]),
    }


def _git_revision() -> str | None:
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != _CHECKOUT:
            return None  # installed inside another repository
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def _peak_memory_bytes() -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "largest_child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    }
    gpus = {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
    return peaks | gpus


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()
