"""`m2-plan`: what a training step costs on a cluster, and which contrastive groups and micro-batches are fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2_encoder.config.output import say
from m2_encoder.config.plan import build_plan, check_plan_settings, name_adaptation
from m2_encoder.errors import Problem
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.planning.report import adaptation_table, print_plan, to_report, train_overrides
from m2_encoder.record import describe_run


def check_plan(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-plan."""
    return check_plan_settings(cfg)


def run_plan(cfg: dict[str, Any]) -> None:
    """Prints the plan; writes it as JSON and draws it where asked to. Raises `UserError` as `build_plan`."""
    plan = build_plan(cfg)
    words = [train_overrides(cfg, plan.best[0].setting, plan.hardware), *name_adaptation(cfg["adaptation"])]
    console, train = open_console(), " ".join(words)
    print_plan(console, plan.cost, plan.request, plan.best, plan.baselines, cluster=cfg["cluster"], train=train)
    if plan.whole is not None:
        console.print(adaptation_table(plan.best[0], plan.whole))
    if cfg["output"] is not None:
        report = {**to_report(*plan), "train": train, "cluster": cfg["cluster"], "configuration": cfg, **describe_run()}
        write_json(Path(cfg["output"]).expanduser(), report, key="output")
        say(f"numbers: {cfg['output']}")
    if cfg["plot"] is not None:
        # Here, because it loads matplotlib, which no other part of the command needs.
        from m2_encoder.planning.figure import draw_scaling

        planned, place = plan.best[0].setting, Path(cfg["plot"]).expanduser()
        draw_scaling(place, plan.scaling, plan.cost, plan.request, cluster=cfg["cluster"], planned=planned)
        say(f"plot: {cfg['plot']}")
