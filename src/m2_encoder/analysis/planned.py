"""Plans of a training step as data: what `m2-plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m2_encoder.analysis.table import Table
from m2_encoder.config.plan import Plan, build_plan, check_plan_settings, read_plan_settings
from m2_encoder.config.problems import refuse_all
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.planning.step import Prediction


def plan_training(**settings: Any) -> Plan:
    """Predicts time, memory and traffic of a training step, and searches for the best groups and micro-batches.

    `best` has the fastest setting of each group size that fits, the fastest first, `baselines` the same rows with a
    loss over all ranks, `scaling` both over numbers of ranks. Nothing is trained; it takes a second.

    Args:
        settings: keys of `m2-plan`, such as `model="m2_encoder_1b"`, `cluster="a100_80g"`, `ranks=256`; others are as
            in `conf/commands/plan.yaml`.

    Raises:
        UserError: for an unknown key or an impossible value, or if nothing fits into memory.
    """
    known = read_plan_settings()
    unknown = [Problem(key, NOTHING, f"no such key; there are {', '.join(known)}") for key in settings.keys() - known]
    refuse_all(unknown)
    cfg = {**known, **settings, "hardware": {**known["hardware"], **settings.get("hardware", {})}}
    refuse_all(check_plan_settings(cfg))
    return build_plan(cfg)


def tabulate_plans(predictions: Sequence[Prediction]) -> Table:
    """A row for each prediction: its setting, and what a step costs. MB are 10^6 bytes that a rank sends."""
    rows = [
        {
            "method": item.setting.method,
            "strategy": item.setting.strategy,
            "g": item.setting.group_size,
            "k": item.setting.micro_batches,
            "B": item.setting.rows,
            "rows contrasted": item.setting.contrasted_rows,
            "memory, GB": item.memory.total / 1e9,
            "step, ms": 1e3 * item.time.total,
            "pairs per s": item.pairs_per_s,
            "sent for contrast, MB": item.communication.bytes_sent / 1e6,
            "sent for gradients, MB": item.gradient_bytes / 1e6,
        }
        for item in predictions
    ]
    return Table(list(rows[0]) if rows else [], rows)
