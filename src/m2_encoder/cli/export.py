"""`m2-export`: a run's checkpoint as a folder that `m2_encoder.load` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.bounds import Text
from m2_encoder.checkpoints.matching_head import read_head
from m2_encoder.checkpoints.training_state import LAST_NAME, read_step
from m2_encoder.config.check import check_settings
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, default_run_folder
from m2_encoder.config.problems import UNSET
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.trusted import refuse_foreign
from m2_encoder.errors import CheckpointError, Problem
from m2_encoder.runs.ending import RunEnd
from m2_encoder.runs.export import (
    EXPORT_FOLDER,
    export_foreign,
    export_run,
    find_head,
    read_foreign,
    read_trained,
)
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_run
from m2_encoder.runs.opening import find_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The keys of `run`."""

    name: Text
    folder: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The keys of m2-export; `conf/commands/export.yaml` says what they mean."""

    run: RunPlace
    checkpoint: Text
    output: Text | None
    overwrite: bool


def check_export(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of `m2-export`."""
    problems = check_settings(ExportSettings, cfg)
    if problems or UNSET in (cfg["run"]["name"], cfg["run"]["folder"]):
        return problems  # what is missing has been reported
    folder, name, output = default_run_folder(cfg), cfg["run"]["name"], _output(cfg)
    try:
        checkpoint = _checkpoint(cfg)
    except CheckpointError as error:
        return [Problem("checkpoint", cfg["checkpoint"], str(error), "give the path of a whole one")]
    if not (folder / CONFIG_FILE).is_file():
        names = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG_FILE}"))
        known = f"; there is: {', '.join(names)}" if names else ""
        problems.append(Problem("run.name", name, f"no run in {folder}{known}", "train it first with m2-train"))
    elif read_run(folder / CONFIG_FILE).get("task") is not None:
        rule = "trained no encoder but what task= names"
        fix = f"m2-train exports that itself, to {folder / EXPORT_FOLDER}, unless run.export=false"
        return [Problem("run.name", name, rule, fix)]
    elif not checkpoint.is_file():
        fix = "give `last` or the path of a checkpoint"
        problems.append(Problem("checkpoint", cfg["checkpoint"], f"no file {checkpoint}", fix))
    elif (owner := checkpoint.resolve().parent.parent) != folder.resolve() and (owner / CONFIG_FILE).is_file():
        # A copy of a checkpoint may lie where no run is.
        elsewhere = "" if owner.parent == folder.resolve().parent else f" run.folder={owner.parent}"
        fix = f"use run.name={owner.name}{elsewhere}"
        problems.append(Problem("checkpoint", cfg["checkpoint"], f"is of the run in {owner}", fix))
    if output.exists() and not cfg["overwrite"]:
        fix = "add overwrite=true, or give another output"
        problems.append(Problem("output", str(output), "exists already", fix))
    return problems


def _checkpoint(cfg: Mapping[str, Any]) -> Path:
    """The checkpoint that is named, or where it would be."""
    named, folder = str(cfg["checkpoint"]), default_run_folder(dict(cfg))
    return find_checkpoint(folder, named) or (folder / LAST_CHECKPOINT if named == "last" else anchor(named))


def _output(cfg: Mapping[str, Any]) -> Path:
    return anchor(cfg["output"]) if cfg["output"] else default_run_folder(dict(cfg)) / EXPORT_FOLDER


def run_export(cfg: dict[str, Any]) -> int:
    """Exports and says where."""
    folder = default_run_folder(cfg)
    trained = read_run(folder / CONFIG_FILE)
    model_node = trained["model"] if is_foreign(trained["model"]) else None
    refuse_foreign({"adaptation": trained.get("adaptation"), "model": model_node})
    checkpoint = _checkpoint(cfg)
    end = RunEnd(read_step(checkpoint), trained["trainer"]["max_steps"])
    places = {"output": _output(cfg), "overwrite": cfg["overwrite"]}
    if model_node is not None:
        written = export_foreign(folder, model=read_foreign(trained, checkpoint), cfg=trained, end=end, **places)
        say(f"exported {checkpoint.name}, step {end}, to {written}; its README.md says how to load it")
        return 0
    model = read_trained(trained, checkpoint)
    found = find_head(trained)
    head = found and read_head(checkpoint, name=found.name, text_expert=found.text_expert)
    output = export_run(folder, model=model, cfg=trained, end=end, matching=head, **places)
    if checkpoint.name != LAST_NAME:
        say(f"exported {checkpoint.name}, step {end}")
    say(f"exported to {output}; use it with m2_encoder.load({str(output)!r})")
    return 0
