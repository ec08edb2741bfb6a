"""Sweeps: which jobs a command line stands for, and what each is called.

Each job of `m2-train -m optimizer.lr=1e-3,2e-3 +experiment=smoke` is a run of its own. Its name is `run.name`
with what is swept behind it (`smoke-lr=0.001`, `smoke-lr=0.002`), so the folders never collide, and the same
sweep started again goes on where it was. `outputs/multirun/<run.name>` holds what belongs to the sweep as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from hydra.core.override_parser.types import Glob, ValueType
from omegaconf import DictConfig

from m2_encoder.config.overrides import parse_override, parse_overrides
from m2_encoder.errors import UserError

MAX_NAME_LENGTH: Final = 100
MAX_NAME_BYTES: Final = 200
"""Of the name of a run: file systems take 255 for a name, and some files have more in theirs."""

_UNSAFE: Final = re.compile(r"[^\w.=+-]+")


def is_sweep_line(line: str) -> bool:
    """Whether an override holds several values; an unreadable one does not."""
    override = parse_override(line)
    return override is not None and override.is_sweep_override()


def is_basic(hydra: DictConfig) -> bool:
    """Whether Hydra's own sweeper runs all combinations, so that the jobs are known before the first."""
    return str(hydra.sweeper._target_).endswith(".BasicSweeper")


def is_search(hydra: DictConfig) -> bool:
    """Whether the sweeper is that of `hydra/sweeper=search`."""
    return str(hydra.sweeper._target_).endswith(".SearchSweeper")


def preset_lines(hydra: DictConfig, lines: Sequence[str]) -> list[str]:
    """What `hydra.sweeper.params` adds to the overrides `lines`, which count where both say something of a key."""
    keys = [line.partition("=")[0] for line in lines]
    params = dict(hydra.sweeper.get("params") or {})
    return [f"{key}={value}" for key, value in params.items() if key not in keys]


def expand_sweep(lines: Sequence[str], hydra: DictConfig) -> list[list[str]]:
    """All jobs of a sweep, as lists of overrides.

    Another sweeper than the basic one decides its values while it runs: only the constant part is known beforehand.

    Raises:
        UserError: for an interval, of which every value would be a job.
    """
    params = dict(hydra.sweeper.get("params") or {})
    all_lines = [*(f"{key}={value}" for key, value in params.items()), *lines]  # as Hydra orders the jobs
    if not is_basic(hydra):
        return [[line for line in all_lines if not is_sweep_line(line)]]
    readable, _ = parse_overrides(all_lines)
    for override in readable:
        if override.value_type == ValueType.INTERVAL_SWEEP:
            fix = f"use {override.key_or_group}=VALUE,VALUE"
            raise UserError(f"{override.input_line}: a sweep runs every value, and an interval names none; {fix}")
    known = {override.input_line for override in readable}
    unreadable = [line for line in all_lines if line not in known]  # reported when the job is composed
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra has no public name for it

    batches = BasicSweeper.split_arguments(readable, None)
    return [[*job, *unreadable] for batch in batches for job in batch]


def name_globbed(lines: Sequence[str], options: Callable[[str], list[str]]) -> list[str]:
    """Overrides in which `group=glob(a*)` has become the options that it stands for.

    Raises:
        UserError: if it stands for none.
    """
    named = []
    for line in lines:
        override = parse_override(line)
        glob: object = None if override is None else override.value()
        if override is not None and isinstance(glob, Glob):
            known = options(override.key_or_group)
            found = glob.filter(known)
            if not found:
                fix = f"choose from {', '.join(known)}" if known else "only groups have options to choose from"
                raise UserError(f"{line}: stands for no option; {fix}")
            line = f"{override.get_key_element()}={','.join(found)}"
        named.append(line)
    return named


def without_constant(job: Sequence[str], constant: Sequence[str]) -> list[str]:
    """The overrides of a job, as the sweeper writes them, but those that all jobs have, as typed."""
    readable, _ = parse_overrides(constant)
    written = {f"{item.get_key_element()}={item.get_value_element_as_str()}" for item in readable}
    return [line for line in job if line not in written and line not in constant]


def swept_values(swept: Sequence[str]) -> dict[str, Any]:
    """What the overrides of a job say, by key; a choice of several options as in the job's name.

    >>> swept_values(["optimizer=muon", "optimizer.lr=1e-3", "objective=[itc,cmlm]", "+seed=null"])
    {'optimizer': 'muon', 'optimizer.lr': 0.001, 'objective': 'itc+cmlm', 'seed': None}
    """
    found = {}
    for line in swept:
        override = parse_override(line)
        if override is not None and override.key_or_group != "run.name":
            value = override.value()
            plain = value is None or isinstance(value, bool | int | float)
            found[override.key_or_group] = value if plain else _split(line)[1]
    return found


def job_name(name: str, swept: Sequence[str]) -> str:
    """Name of one job: what is swept behind the common name.

    >>> job_name("smoke", ["optimizer.lr=1e-3", "objective.cmlm.weight=2", "objective=[itc,cmlm]"])
    'smoke-lr=1e-3-cmlm.weight=2-objective=itc+cmlm'
    """
    pairs = [_split(line) for line in swept]
    pairs = [
        (key, value) for key, value in pairs if key not in ("run.name", "run.resume") and not key.startswith("hydra.")
    ]
    if not pairs:
        return name
    labels = _label([key for key, _ in pairs])
    parts = [f"{label}={value}" for label, (_, value) in zip(labels, pairs, strict=True)]
    full = _UNSAFE.sub("-", "-".join([name, *parts]))
    if len(full) <= MAX_NAME_LENGTH and len(full.encode()) <= MAX_NAME_BYTES:
        return full
    digest = hashlib.sha256(" ".join(swept).encode()).hexdigest()[:8]
    head = full[: MAX_NAME_LENGTH - 9].encode()[: MAX_NAME_BYTES - 9].decode("utf-8", "ignore")
    return f"{head}-{digest}"


def _split(line: str) -> tuple[str, str]:
    """Key and value, the value as it looks in a name."""
    key, _, text = line.lstrip("+").partition("=")
    override = parse_override(line)
    value = None if override is None else override.value()
    return key, _show(value) if isinstance(value, list | dict) else text.strip("'\"")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_show, value))
    if isinstance(value, dict):
        return "+".join(f"{_show(key)}-{_show(item)}" for key, item in value.items())
    return "null" if value is None else str(value)


def _label(keys: Sequence[str]) -> list[str]:
    """The end of each key that says whose value it is: `lr`, but `cmlm.weight` of `objective.cmlm.weight`.

    What lies below a name, such as an objective's, always keeps that name: it is called the same in every sweep. Keys
    that would be called the same get longer.
    """
    parts = [key.split(".") for key in keys]
    lengths = [min(len(part), 2 if len(part) > 2 else 1) for part in parts]
    while True:
        labels = [".".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        longer = [
            length + (labels.count(label) > 1 and length < len(part))
            for part, length, label in zip(parts, lengths, labels, strict=True)
        ]
        if longer == lengths:
            return labels
        lengths = longer
