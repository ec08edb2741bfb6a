"""The loggers of a run beside `metrics.jsonl`: how they start, what they get, how they end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger

from m2_encoder.bounds import refuse
from m2_encoder.config.loggers import WANDB_TARGET, fill_folders, give
from m2_encoder.config.output import say
from m2_encoder.errors import Problem, UserError
from m2_encoder.runs.ending import Results
from m2_encoder.runs.folder import flatten
from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.runs.loggers import first_line
from m2_encoder.runs.wandb_logger import QuietWandbLogger


def build_loggers(cfg: Mapping[str, Any], folder: Path, *, resumes: bool) -> list[Logger]:
    """The loggers that a configuration names; the others than W&B know it as flat hyperparameters.

    Raises:
        UserError: for one that is none, or cannot start.
    """
    values = {"folder": folder, "run_name": cfg["run"]["name"], "cfg": cfg, "resumes": resumes}
    nodes = fill_folders(cfg["logger"], str(folder))
    others = [name for name, node in nodes.items() if node["_target_"] != WANDB_TARGET]
    made: dict[str, Logger] = {}
    for name in [*others, *(name for name in nodes if name not in others)]:  # W&B, which never fails, is the last
        node = nodes[name]
        try:
            # The configuration that W&B is given is a value: nothing in it is built, and it stays a mapping.
            built = instantiate(node, _recursive_=False, _convert_="all", **give(node, values))
            if built is None:
                continue  # W&B on other ranks, or where it cannot start
            check_kind("logger", nodes, {name: built}, Logger)
            if name in others:
                built.log_hyperparams(flatten(cfg))
        except UserError:
            raise
        except Exception as error:  # others' code raises what it likes
            cause = error.__cause__ or error
            raise UserError(
                f"cannot start ({first_line(cause)})", key=f"logger.{name}", value=node["_target_"]
            ) from error
        made[name] = built
    return list(made.values())


def replay(trainer: lightning.Trainer, metrics_file: Path) -> None:
    """Hands W&B what it lacks of a run's `metrics.jsonl`."""
    for sink in trainer.loggers:
        if isinstance(sink, QuietWandbLogger):
            sink.replay(metrics_file)


def close_loggers(trainer: lightning.Trainer, results: Results | None) -> None:
    """Ends the loggers of a run, with its final metrics; None for a run that did not get to its end."""
    for sink in trainer.loggers:
        if isinstance(sink, QuietWandbLogger):
            sink.close(results)
        elif results is not None and results.metrics and not isinstance(sink, JsonlLogger):
            try:
                sink.log_metrics(dict(results.metrics), results.step)
                sink.save()
                sink.finalize("success")
            except Exception as error:  # others' code raises what it likes, and the run is done
                say(f"{type(sink).__name__}: stopped ({first_line(error)}); summary.json has the metrics", error=True)


def check_kind(group: str, nodes: Mapping[str, Any], made: Mapping[str, Any], kind: type) -> None:
    """Refuses objects of another kind than a group holds."""
    rule = f"must be a subclass of {kind.__module__}.{kind.__name__}"
    refuse(
        [
            Problem(f"{group}.{name}._target_", nodes[name]["_target_"], rule, "derive it from that")
            for name, each in made.items()
            if not isinstance(each, kind)
        ]
    )
