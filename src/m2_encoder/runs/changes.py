"""What a command line changes about a run that it continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from m2_encoder.runs.folder import UNSAID, read_config

_FREE: Final = (
    "run",
    "logger",
    "evaluation",
    "cluster",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "data.folder",
    "data.num_workers",
    "data.cache",
    "data.stall_timeout_s",
    "data.new_segment",
)
"""Settings that change neither what is trained nor on what."""

_FREE_ARGUMENTS: Final = ("weight", "schedule")


class Change(NamedTuple):
    """A setting that is not what it was.

    Attributes:
        key: dotted, below the node that was compared.
        before: None where it was not given.
        now: likewise.
    """

    key: str
    before: Any
    now: Any


def describe_changes(path: Path, cfg: Mapping[str, Any]) -> list[str]:
    """Settings that differ from those a run was started with last, as "KEY: OLD then, NEW now".

    The order of samples is refused if it changes, and the model's shape; all other changes are the user's right, but
    not to be made unseen: after one of captions or augmentation a resumed run is no longer the uninterrupted one.

    Args:
        path: `config.yaml` of the run; where there is none, nothing is known to have changed.
        cfg: the configuration of now, resolved.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return []
    return list(_compare("", UNSAID | read_config(path), UNSAID | dict(cfg)))


def _compare(key: str, before: Any, now: Any) -> Iterator[str]:
    if key in _FREE or before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            yield from _compare(f"{key}.{name}".lstrip("."), before.get(name), now.get(name))
    else:
        yield f"{key}: {before!r} then, {now!r} now"


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Arguments of an objective that differ, in the order of the configuration; weight and schedule are free.

    Args:
        before: the objective's node, as a resolved configuration has it.
        now: likewise.
    """
    old, new = (dict(_leaves(node)) for node in (before, now))
    keys = [key for key in dict.fromkeys((*new, *old)) if key not in _FREE_ARGUMENTS and old.get(key) != new.get(key)]
    return [Change(key, old.get(key), new.get(key)) for key in keys]


def _leaves(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and key not in _FREE_ARGUMENTS:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
