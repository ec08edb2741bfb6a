"""Values that passed their own checks, for rules that compare several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from m2_encoder.config.check import lacks
from m2_encoder.config.problems import UNSET
from m2_encoder.errors import Problem

_MISSING: Final = object()


class UnknownValueError(Exception):
    """A value that a check needs is missing or wrong already."""


class Known:
    """The values of a configuration but those of keys that are reported."""

    def __init__(self, cfg: Mapping[str, Any], reported: set[str]) -> None:
        self._cfg = cfg
        self._reported = reported

    def __call__(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a dotted key; without a default the calling check ends where there is none."""
        node = self._find(key)
        if key not in self._reported and node is not UNSET and node is not _MISSING:
            return node
        if default is _MISSING:
            raise UnknownValueError(key)
        return default

    def is_complete(self, key: str) -> bool:
        """Whether nothing at this key or below it is missing or wrong."""
        inside = any(found == key or found.startswith(f"{key}.") for found in self._reported)
        return not inside and not lacks(self(key, UNSET))

    def has(self, key: str) -> bool:
        """Whether the key is there at all, right or wrong."""
        return self._find(key) is not _MISSING

    def _find(self, key: str) -> Any:
        node: Any = self._cfg
        for part in key.split("."):
            node = node.get(part, _MISSING) if isinstance(node, Mapping) else _MISSING
        return node


def run_check(check: Callable[[Known], Iterator[Problem]], known: Known) -> list[Problem]:
    """What a check finds until it needs a value that is not known."""
    found: list[Problem] = []
    try:
        for problem in check(known):
            found.append(problem)  # noqa: PERF402 - what was found before the check ends early counts
    except UnknownValueError:
        pass
    return found


def count_devices(devices: Any, available: int) -> int:
    """How many devices `trainer.devices` means."""
    if isinstance(devices, list):
        return len(devices)
    return available if devices in ("auto", -1) else int(devices)


def count_ranks(known: Known) -> int:
    """World size W of a configuration."""
    gpus = count_gpus(known)
    return count_devices(known("trainer.devices"), 1 if gpus is None else gpus) * int(known("trainer.num_nodes"))


def count_gpus(known: Known) -> int | None:
    """How many GPUs this machine has; None if a run is to use the CPU."""
    accelerator, gpus = known("trainer.accelerator"), torch.cuda.device_count()
    return gpus if accelerator in {"gpu", "cuda"} or (accelerator == "auto" and gpus > 0) else None
