"""The committed results of the benchmarks as data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.analysis.table import Table
from m2_encoder.config.paths import PACKAGE_FOLDER, find_checkout
from m2_encoder.errors import UserError


class Benchmark(NamedTuple):
    """What one script of `benchmarks/` wrote."""

    path: Path
    machine: Mapping[str, Any]
    rows: Table  # what was measured: medians and spread
    figures: Mapping[str, Any]  # what is quoted


def read_benchmark(name: str, machine: str = "*") -> Benchmark:
    """Results of `benchmarks/<name>.py`, such as `contrastive`; of several machines, the first.

    Raises:
        UserError: outside of a checkout, which alone has them, or if there are none of that name.
    """
    root = find_checkout() or find_checkout(PACKAGE_FOLDER)
    if root is None:
        raise UserError("results of benchmarks are part of a checkout, not of an installed package; start there")
    folder = root / "benchmarks" / "results"
    found = sorted(folder.glob(f"{name}-{machine}.json"))
    if not found:
        known = sorted({path.stem.partition("-")[0] for path in folder.glob("*.json")})
        raise UserError(f"no results of that name; there are {', '.join(known)}", key="name", value=name)
    content = json.loads(found[0].read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(key for row in content["rows"] for key in row))
    return Benchmark(found[0], content["machine"], Table(columns, content["rows"]), content["figures"])


def read_grouped_speedups(machine: str = "*") -> Table:
    """Speed of a grouped training step over full logits on every rank, as measured and as predicted.

    A row per setting of `benchmarks/grouped_training.py`: `latency_ms` (one way), `bandwidth`, `group_size`,
    `micro_batches`, `measured` and `planned`; above 1 is faster.

    Raises:
        UserError: as `read_benchmark`.
    """
    figures = read_benchmark("grouped_training", machine).figures
    rows = []
    for setting, measured in figures["speedup"].items():
        if match := re.fullmatch(r"(\S+) ms, (.+), g=(\d+), k=(\d+)", setting):
            place = {"latency_ms": float(match[1]), "bandwidth": match[2]}
            sizes = {"group_size": int(match[3]), "micro_batches": int(match[4])}
            both = {"measured": measured["full"], "planned": figures["planned"][setting]["full"]}
            rows.append({**place, **sizes, **both})
    return Table(["latency_ms", "bandwidth", "group_size", "micro_batches", "measured", "planned"], rows)
