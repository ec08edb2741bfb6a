"""A run's model as a folder that `m2_encoder.load` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.card import build_card
from m2_encoder.checkpoints.export import CardInfo, export_model
from m2_encoder.checkpoints.io import load_model
from m2_encoder.checkpoints.matching_head import HEAD_FILE, MatchingHead
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_adaptation
from m2_encoder.runs.provenance import command_line, git_revision, versions
from m2_encoder.training.adaptation import merge_adaptation

EXPORT_FOLDER: Final = "export"
SUMMARY_FILE: Final = "summary.json"


def export_run(
    run_folder: Path,
    *,
    model: M2Encoder,
    cfg: Mapping[str, Any],
    matching: MatchingHead | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports a model with what its run's folder knows about it.

    Args:
        run_folder: `summary.json` in it gives the metrics, if it is there.
        model: what is exported.
        cfg: the run's resolved configuration.
        matching: the trained head, where the run had one.
        output: where; `<run_folder>/export` by default.
        overwrite: replace an existing folder.

    Returns:
        The folder written.
    """
    return export_model(
        output or run_folder / EXPORT_FOLDER,
        model=model,
        tokenizer=build_tokenizer(cfg["model"], model.config),
        metrics=read_metrics(run_folder / SUMMARY_FILE),
        provenance={
            "run": cfg["run"]["name"],
            "git_revision": git_revision(),
            "command": command_line(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        },
        card=_card(cfg, matching),
        matching=matching,
        overwrite=overwrite,
    )


def read_trained(cfg: Mapping[str, Any], checkpoint: Path) -> M2Encoder:
    """The plain model of a checkpoint.

    Args:
        cfg: the resolved configuration of its run.
        checkpoint: of that run.

    Raises:
        CheckpointError: if its parameters are not those of the run.
    """
    config = build_model_config(cfg["model"])
    adaptation = build_adaptation(cfg, config)
    model = load_model(config, checkpoint, prepare=adaptation.apply)
    return merge_adaptation(adaptation, model.requires_grad_(False))


def _card(cfg: Mapping[str, Any], matching: MatchingHead | None) -> CardInfo:
    card = build_card(cfg)
    if matching is None:
        return card
    use = f"{HEAD_FILE}; it orders retrieved candidates anew: m2-evaluate model=FOLDER rerank=16"
    return dataclasses.replace(card, training={**card.training, "matching head": use})


def read_metrics(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Final metrics of a `summary.json` as split, language, metric; empty if there is no such file.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["table"]
        return {
            split: {
                language: {name: float(value) for name, value in values.items()}
                for language, values in languages.items()
            }
            for split, languages in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; evaluate again with m2-train ... run.resume=auto") from error
