"""Sweeps: which jobs a command line stands for, and what each is called.

Each job of `m2-train -m optimizer.lr=1e-3,2e-3 +experiment=smoke` is a run of its own. Its name is `run.name`
with what is swept behind it (`smoke-lr=0.001`, `smoke-lr=0.002`), so the folders never collide, and the same
sweep started again with `run.resume=auto` continues every job where it was. Hydra's records of the sweep go
to `outputs/multirun/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Final

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

from m2_encoder.cli.compose import parse_override, parse_overrides

MAX_NAME_LENGTH: Final = 100
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._=+-]+")


def is_sweep_line(line: str) -> bool:
    """Whether an override holds several values; an unreadable one does not."""
    override = parse_override(line)
    return override is not None and override.is_sweep_override()


def expand_sweep(lines: Sequence[str], hydra: DictConfig) -> list[list[str]]:
    """All jobs of a sweep, as lists of overrides.

    Args:
        lines: the overrides of the command line.
        hydra: Hydra's settings; another sweeper than the basic one decides its values while it runs, so that
            only the constant part can be known beforehand.
    """
    params = dict(hydra.sweeper.get("params") or {})
    all_lines = [*(f"{key}={value}" for key, value in params.items()), *lines]
    if not str(hydra.sweeper._target_).endswith(".BasicSweeper"):
        return [[line for line in all_lines if not is_sweep_line(line)]]
    readable, _ = parse_overrides(all_lines)
    known = {override.input_line for override in readable}
    unreadable = [line for line in all_lines if line not in known]  # reported when the job is composed
    batches = BasicSweeper.split_arguments(readable, None)
    return [[*job, *unreadable] for batch in batches for job in batch]


def job_name(name: str, swept: Sequence[str]) -> str:
    """Name of one job: what is swept behind the common name.

    >>> job_name("smoke", ["optimizer.lr=1e-3", "seed=2"])
    'smoke-lr=1e-3-seed=2'
    """
    parts = [part for line in swept if (part := _short(line))]
    if not parts:
        return name
    full = _UNSAFE.sub("-", "-".join([name, *parts]))
    if len(full) <= MAX_NAME_LENGTH:
        return full
    digest = hashlib.sha256(" ".join(swept).encode()).hexdigest()[:8]
    return f"{full[: MAX_NAME_LENGTH - 9]}-{digest}"


def sweep_problems(cfg: dict[str, Any], hydra: DictConfig) -> list[str]:
    """What cannot be swept on this machine."""
    trainer = cfg.get("trainer")
    devices = trainer.get("devices") if isinstance(trainer, dict) else 1
    local = str(hydra.launcher._target_).endswith(".BasicLauncher")
    if local and devices not in (1, "1", None):
        return [
            f"trainer.devices={devices}: a sweep here runs one job after the other on one device, because "
            "the ranks of "
            "a job would start the sweep again; sweep with trainer.devices=1 or cluster=slurm"
        ]
    return []


def _short(line: str) -> str:
    key, _, value = line.lstrip("+").partition("=")
    if key == "run.name" or key.startswith("hydra."):
        return ""
    return f"{key.rpartition('.')[2]}={value}"
