"""`m2-export`: a model as a folder that `m2_encoder.load` and other tools read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.bounds import Text
from m2_encoder.checkpoints.training_state import LAST_NAME
from m2_encoder.cli.export_mixed import is_mixed, mixed_source
from m2_encoder.cli.export_sources import (
    architecture_of,
    model_source,
    named_checkpoint,
    output_of,
    run_problems,
    run_source,
    source_problems,
)
from m2_encoder.config.check import check_settings, check_targets
from m2_encoder.config.output import say
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.problems import UNSET, find_problems
from m2_encoder.config.schema import Pictures, check_tasks, is_foreign
from m2_encoder.config.trusted import refuse_foreign
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.native import Native
from m2_encoder.exports.parity import print_parity
from m2_encoder.exports.writing import MissedError, write_export
from m2_encoder.runs.build import build_formats
from m2_encoder.runs.export import (
    export_foreign,
    find_end,
    read_adapter_of,
    read_foreign,
    read_trained,
    read_trained_head,
    trains_apart,
)
from m2_encoder.runs.folder import CONFIG_FILE, read_run

EXIT_MISSED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The keys of `run`."""

    name: Text | None
    folder: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The keys of m2-export; `conf/commands/export.yaml` says what they mean."""

    to: Mapping[str, Any]
    run: RunPlace
    checkpoint: Text
    model: Any
    shares: Any
    weights: Any
    tokenizer: Any
    pictures: Pictures
    adapter: Text | None
    output: Text | None
    overwrite: bool


def check_export(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of `m2-export`."""
    problems = [*check_settings(ExportSettings, cfg), *check_tasks(cfg["to"], "to"), *check_targets(cfg, given={})]
    if problems or UNSET in (cfg["run"]["name"], cfg["run"]["folder"], cfg["model"], *cfg["to"].values()):
        return problems  # what is missing has been reported
    if not cfg["to"]:
        return [Problem("to", [], "writes nothing", "choose native, onnx or others")]
    if cfg["model"] is None and cfg["run"]["name"] is None:
        fix = "add run.name=NAME, or model=FOLDER for a model that is exported already"
        return [Problem("run.name", "???", "must be given", fix)]
    return (run_problems(cfg) if cfg["model"] is None else source_problems(cfg)) or _format_problems(cfg)


def _format_problems(cfg: dict[str, Any]) -> list[Problem]:
    """What keeps this model from being written in these formats."""
    try:
        formats = build_formats(cfg["to"])
        if _is_foreign_run(cfg):
            names = [name for name, each in formats.items() if not isinstance(each, Native)]
            rule = "somebody else's model is exported as native alone"
            return [Problem(f"to.{name}", NOTHING, rule, "leave it out") for name in names]
        config = architecture_of(cfg)
    except UserError as error:
        return find_problems(error)
    if (apart := [name for name, each in formats.items() if each.needs_adapter]) and not _trains_apart(cfg):
        rule = "keeps low-rank updates apart from their base, which a run with adaptation=lora alone has"
        return [Problem(f"to.{name}", NOTHING, rule, "leave it out") for name in apart]
    return [
        problem._replace(key=f"to.{name}.{problem.key}".rstrip("."))
        for name, each in formats.items()
        for problem in each.problems(config)
    ]


def _is_foreign_run(cfg: dict[str, Any]) -> bool:
    return cfg["model"] is None and is_foreign(read_run(default_run_folder(cfg) / CONFIG_FILE)["model"])


def _trains_apart(cfg: dict[str, Any]) -> bool:
    return cfg["model"] is None and trains_apart(read_run(default_run_folder(cfg) / CONFIG_FILE))


def run_export(cfg: dict[str, Any]) -> int:
    """Exports and says where; returns 1 if a format was left out."""
    output = output_of(cfg)
    if cfg["model"] is not None:
        return _write(cfg, output, mixed_source(cfg) if is_mixed(cfg) else model_source(cfg))
    folder = default_run_folder(cfg)
    trained = read_run(folder / CONFIG_FILE)
    model_node = trained["model"] if is_foreign(trained["model"]) else None
    refuse_foreign({"adaptation": trained.get("adaptation"), "model": model_node})
    checkpoint = named_checkpoint(cfg)
    end = find_end(trained, checkpoint)
    if model_node is not None:
        model = read_foreign(trained, checkpoint)
        written = export_foreign(folder, model=model, cfg=trained, end=end, output=output, overwrite=cfg["overwrite"])
        say(f"exported {checkpoint.name}, step {end}, to {written}; its README.md says how to load it")
        return 0
    head = read_trained_head(trained, checkpoint)
    source = run_source(folder, model=read_trained(trained, checkpoint), cfg=trained, end=end, matching=head)
    if any(each.needs_adapter for each in build_formats(cfg["to"]).values()):
        source = dataclasses.replace(source, adapter=read_adapter_of(trained, checkpoint))
    return _write(cfg, output, source, note="" if checkpoint.name == LAST_NAME else f"{checkpoint.name}, step {end}")


def _write(cfg: dict[str, Any], output: Path, source: ExportSource, *, note: str = "") -> int:
    """Writes all formats and prints what they were found to give."""
    console, formats = open_console(), build_formats(cfg["to"])
    try:
        with console.status("writing and trying " + ", ".join(formats)):
            parity = write_export(output, source=source, formats=formats, overwrite=cfg["overwrite"])
    except MissedError as error:
        print_parity(console, error.parity)
        raise
    print_parity(console, parity)
    if note:
        say(f"exported {note}")
    is_native = any(isinstance(formats[each.name], Native) and each.holds for each in parity.results)
    say(f"exported to {output}" + (f"; use it with m2_encoder.load({str(output)!r})" if is_native else ""))
    return EXIT_MISSED if parity.missed else 0
