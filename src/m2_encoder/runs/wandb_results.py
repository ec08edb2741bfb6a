"""The end of a run as W&B shows it: a table by split and language, pictures, and what is uploaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, find_newest
from m2_encoder.runs.ending import Results
from m2_encoder.types import LANGUAGES

Artifact = Literal["export", "checkpoint"]
"""What is uploaded: the folder `export`, or the newest whole checkpoint."""

_METRIC: Final = re.compile(rf"val/(.+)_({'|'.join(LANGUAGES)})/(.+)|val/([^/]+)()/(.+)")


def tabulate(metrics: Mapping[str, float]) -> tuple[list[str | int], list[list[Any]]]:
    """Columns and rows of a table with one row per split and language; other metrics are left out.

    >>> tabulate({"val/a_zh/i2t_r@1": 40.0, "val/a_en/i2t_r@1": 50.0, "loss": 1.0})
    (['split', 'language', 'i2t_r@1'], [['a', 'zh', 40.0], ['a', 'en', 50.0]])
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in metrics.items():
        if found := _METRIC.fullmatch(name):
            split, language, metric = (found[index] or found[index + 3] or "" for index in (1, 2, 3))
            rows.setdefault((split, language), {})[metric] = float(value)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return ["split", "language", *names], [[*key, *map(row.get, names)] for key, row in rows.items()]


def make_media(results: Results) -> dict[str, Any]:
    """The table `results`, and each picture as `pictures/<its name>`."""
    import wandb

    columns, rows = tabulate(results.metrics)
    media: dict[str, Any] = {"results": wandb.Table(columns=columns, data=rows)} if rows else {}
    return media | {f"pictures/{path.stem}": wandb.Image(str(path)) for path in results.pictures if path.is_file()}


def upload(run: Any, what: Artifact, folder: Path) -> None:
    """Makes an artifact `<what>-<id of the run>` of type `model`; its files stay where they are."""
    import wandb

    artifact = wandb.Artifact(f"{what}-{run.id}", type="model")
    newest = find_newest(folder / CHECKPOINT_FOLDER) if what == "checkpoint" else None
    path = folder / what if newest is None else newest.path
    if path.is_dir():
        artifact.add_dir(str(path), policy="immutable")
    else:
        artifact.add_file(str(path), policy="immutable")
    run.log_artifact(artifact)
