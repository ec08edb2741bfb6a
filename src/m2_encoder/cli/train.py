"""`m2-train`: one run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.output import say
from m2_encoder.config.paths import default_run_folder, is_debug
from m2_encoder.config.problems import find_problems
from m2_encoder.config.schema import MODEL_FIELDS
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import Problem, UserError, abridge

_MAY_DIFFER: Final = (
    "run.resume",
    "run.metric",
    "run.debug",
    "model.pictures",
)  # of what trains the same; null pictures are filled in


def check_job(cfg: dict[str, Any], *, as_before: bool) -> list[Problem]:
    """Why a sweep's job cannot go on with the run that is there; a single run finds out when it starts.

    With `as_before`, nobody has asked to go on with a run that has other settings.
    """
    folder = default_run_folder(cfg)
    if cfg["run"]["resume"] == "never" or is_debug(cfg) or is_done(cfg):
        return []
    from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, find_newest
    from m2_encoder.runs.build import build_module, build_objectives
    from m2_encoder.runs.folder import CONFIG_FILE, read_config, with_length
    from m2_encoder.runs.pictures import settle_pictures
    from m2_encoder.runs.resume import check_resume, describe_changes

    try:
        newest = find_newest(folder / CHECKPOINT_FOLDER)
        if newest is not None:
            cfg, _ = settle_pictures(cfg, folder, resumes=True)
            if (folder / CONFIG_FILE).is_file():
                cfg = with_length(cfg, read_config(folder / CONFIG_FILE))
            check_resume(build_module(cfg, build_objectives(cfg), validation_name=""), cfg, folder, newest.path)
        changes = describe_changes(folder / CONFIG_FILE, cfg) if as_before else []
    except UserError as error:
        return find_problems(error)
    if not changes:
        return []
    rule = f"{folder} holds a run with other settings: {abridge(', '.join(changes), 200)}"
    return [Problem("run.name", cfg["run"]["name"], rule, "give another run.name, or run.resume=auto to go on with it")]


def is_done(cfg: dict[str, Any]) -> bool:
    """Whether a run has done all its steps with these settings, and was evaluated and exported."""
    from m2_encoder.analysis.recorded import flatten, read_run
    from m2_encoder.runs.export import EXPORT_FOLDER
    from m2_encoder.runs.folder import CONFIG_FILE, fill_in, with_length

    folder = default_run_folder(cfg)
    if cfg["run"]["resume"] == "never" or is_debug(cfg) or not (folder / CONFIG_FILE).is_file():
        return False
    run = read_run(folder)
    cfg = with_length(cfg, run.config)
    exported = (folder / EXPORT_FOLDER).is_dir() or not cfg["run"]["export"]
    before, now = (
        {k: v for k, v in flatten(fill_in(each)).items() if k not in _MAY_DIFFER} for each in (run.config, cfg)
    )
    return run.is_finished and exported and before == now


def run_train(cfg: dict[str, Any]) -> None:
    """Trains; Lightning is imported only now, when the configuration is known to be fine.

    Raises:
        UserError: for what cannot be used; if there is no `run.metric` at the end, or it is not finite.
    """
    from m2_encoder.runs.run import train

    metrics = train(cfg)
    if is_first_rank() and cfg["run"].get("metric") is not None:
        _measure(cfg, metrics)


def measure_run(cfg: dict[str, Any]) -> float | None:
    """The value of `run.metric` in a run's folder.

    Raises:
        UserError: if there is none.
    """
    return _measure(cfg, {})


def _measure(cfg: dict[str, Any], last: Mapping[str, float]) -> float | None:
    from m2_encoder.analysis.recorded import read_run
    from m2_encoder.runs.metric import find_metric

    run = read_run(default_run_folder(cfg))
    validated = {name for line in run.log for name in line}
    return find_metric(cfg["run"].get("metric"), {**run.metrics, **last}, validated)


def name_repetition(cfg: dict[str, Any], folder: Path, lines: Sequence[str]) -> list[str]:
    """A free name for `--config-path outputs/<name> --config-name config`, which repeats a run beside itself.

    Its `config.yaml` holds the sizes of its model; another `model.name` brings those of that name.
    """
    run = cfg.get("run")
    if not isinstance(run, dict) or not all(isinstance(run.get(key), str) for key in ("name", "folder")):
        return []  # something is missing, which validation will say
    original = default_run_folder(cfg)
    sizes = []
    if (cfg.get("model") or {}).get("num_parameters") and any(line.startswith("model.name=") for line in lines):
        given = {line.partition("=")[0] for line in lines}
        sizes = [f"model.{name}=null" for name in MODEL_FIELDS if f"model.{name}" not in given]
    named = any(line.startswith(("run.name=", "run.resume=")) for line in lines)
    if named or folder != original:
        return sizes
    number = 2
    while (name := f"{original.name}-{number}") and (original.parent / name).exists():
        number += 1
    say(f"m2-train: repeating {original.name} as {name}", error=True)
    return [f"run.name={name}", *sizes]


def main() -> int:
    """Entry point of `python -m m2_encoder.cli.train`, which is `m2-train`."""
    return TRAIN()


if __name__ == "__main__":
    sys.exit(main())
