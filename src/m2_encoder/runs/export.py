"""A run's model as a folder that `m2_encoder.load` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from m2_encoder.checkpoints.card import CardInfo, build_card
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import build_model, read_state
from m2_encoder.checkpoints.matching_head import HEAD_FILE, MatchingHead, head_of_state, read_head
from m2_encoder.checkpoints.peft_files import LoraAdapter
from m2_encoder.checkpoints.towers import export_towers
from m2_encoder.checkpoints.training_state import AVERAGE_KEY, read_average, read_step
from m2_encoder.checkpoints.visual_tokenizer import save_visual_tokenizer
from m2_encoder.checkpoints.vocabulary import check_stored, find_tokenizer
from m2_encoder.config.model_choice import build_any_tokenizer, build_model_config, build_tokenizer, build_towers
from m2_encoder.errors import CheckpointError, UserError, under
from m2_encoder.evaluation.suite import SUMMARY_FILE
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.two_towers import TwoTowers
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective, active
from m2_encoder.objectives.matching import Matching
from m2_encoder.pictures import STANDARD, PicturePolicy, read_policy
from m2_encoder.record import describe_run
from m2_encoder.runs.build import build_adaptation
from m2_encoder.runs.ending import RunEnd
from m2_encoder.runs.folder import UNSAID
from m2_encoder.training.adaptation import Adaptation, merge_adaptation
from m2_encoder.training.adaptations.lora import Lora

EXPORT_FOLDER: Final = "export"
_MATCHING: Final = f"{Matching.__module__}.{Matching.__qualname__}"


class HeadOfRun(NamedTuple):
    """Which objective of a run has the matching head."""

    name: str  # of the objective
    text_expert: bool  # as it was trained


def find_head(cfg: Mapping[str, Any]) -> HeadOfRun | None:
    """The matching objective in a run's resolved configuration, the first if there are several; None without one."""
    for name, node in active(cfg.get("objective") or {}).items():
        if node["_target_"] == _MATCHING:
            return HeadOfRun(name, bool(node.get("text_expert", False)))
    return None


def trained_head(objectives: Mapping[str, Objective]) -> MatchingHead | None:
    """The head of the first matching objective among trained ones; None without one."""
    return next((MatchingHead(o.head, o.text_expert) for o in objectives.values() if isinstance(o, Matching)), None)


def export_run(
    run_folder: Path,
    *,
    model: M2Encoder,
    cfg: Mapping[str, Any],
    end: RunEnd,
    matching: MatchingHead | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports a model with what its run's folder knows about it; arguments are those of `read_facts`, too.

    Returns the folder written.
    """
    facts = read_facts(run_folder, cfg=cfg, end=end, matching=matching)
    return export_model(
        output or run_folder / EXPORT_FOLDER,
        model=model,
        tokenizer=build_tokenizer(cfg["model"], model.config),
        matching=matching,
        overwrite=overwrite,
        **facts,
    )


def read_facts(
    run_folder: Path, *, cfg: Mapping[str, Any], end: RunEnd, matching: MatchingHead | None = None
) -> dict[str, Any]:
    """What `export_model` and `model_card` are told about a run's model: pictures, metrics, provenance, card.

    `summary.json` in the run's folder gives the metrics, if it is there and of this step.
    """
    facts = _facts_of_training(run_folder)
    return {
        "pictures": _pictures_of(cfg),
        "metrics": read_metrics(run_folder / SUMMARY_FILE, step=end.taken_step, averaged=end.averaged),
        "provenance": _origin(cfg, facts) | {"versions": ", ".join(map(" ".join, facts["versions"].items()))},
        "card": _card(cfg, end, matching),
    }


def _facts_of_training(run_folder: Path) -> dict[str, Any]:
    """Revision, versions and command of the training, as `summary.json` has them; of this process without one."""
    now = describe_run()
    try:
        summary = json.loads((run_folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        return {key: summary[key] if type(summary.get(key)) is type(value) else value for key, value in now.items()}
    except (OSError, ValueError, AttributeError):  # none was written, or `read_metrics` says what is wrong with it
        return now


def export_foreign(
    run_folder: Path,
    *,
    model: TwoTowers,
    cfg: Mapping[str, Any],
    end: RunEnd,
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports somebody else's model; returns the folder written."""
    return export_towers(
        output or run_folder / EXPORT_FOLDER,
        model=model,
        tokenizer=build_any_tokenizer(cfg["model"]),
        target=str(cfg["model"]["_target_"]),
        pictures=_pictures_of(cfg),
        metrics=read_metrics(run_folder / SUMMARY_FILE, step=end.taken_step, averaged=end.averaged),
        provenance={**_origin(cfg, describe_run()), "steps": str(end)},
        overwrite=overwrite,
    )


def read_foreign(cfg: Mapping[str, Any], checkpoint: Path) -> TwoTowers:
    """Somebody else's model at a run's checkpoint.

    Raises:
        UserError: if its parameters are not those of the run.
    """
    towers = build_towers({**cfg["model"], "weights": None}, build_any_tokenizer(cfg["model"]))
    adaptation = build_adaptation(cfg, None)
    adaptation.apply(cast("M2Encoder", towers))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    own = _of_model({**state, **read_average(checkpoint, final=_final(cfg))})
    try:
        towers.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: is of another model than {towers.config.name} builds now") from error
    return merge_adaptation(adaptation, towers.requires_grad_(False).eval())


def read_trained(cfg: Mapping[str, Any], checkpoint: Path) -> M2Encoder:
    """The plain model of a run's checkpoint, of its moving average where the run's `run.final` names that.

    Raises:
        CheckpointError: if its parameters or its tokenizer are not those of the run.
    """
    model, adaptation = _read_adapted(cfg, checkpoint)
    return merge_adaptation(adaptation, model)


def trains_apart(cfg: Mapping[str, Any]) -> bool:
    """Whether what a run trains can be kept apart from its base."""
    return (UNSAID | dict(cfg))["adaptation"]["_target_"] == f"{Lora.__module__}.{Lora.__qualname__}"


def read_adapter_of(cfg: Mapping[str, Any], checkpoint: Path) -> LoraAdapter:
    """What a run with `trains_apart` has trained.

    Raises:
        UserError: as `read_trained`, or if there is nothing.
    """
    model, adaptation = _read_adapted(cfg, checkpoint)
    assert isinstance(adaptation, Lora), "as trains_apart says"
    with under("adaptation"):
        return adaptation.take_adapter(model)


def _read_adapted(cfg: Mapping[str, Any], checkpoint: Path) -> tuple[M2Encoder, Adaptation]:
    config = build_model_config(cfg["model"])
    adaptation = build_adaptation(cfg, config)
    tokenizer = build_tokenizer(cfg["model"], config)
    check_stored(find_tokenizer(checkpoint).sha256, tokenizer, weights=checkpoint)
    state = read_state(checkpoint) | _of_model(read_average(checkpoint, final=_final(cfg)))
    model = build_model(config, state, source=str(checkpoint), prepare=adaptation.apply)
    return model.requires_grad_(False), adaptation


def find_end(cfg: Mapping[str, Any], checkpoint: Path) -> RunEnd:
    """Where a run was at one of its checkpoints, and which of its weights are taken.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or lacks the average that `run.final` names.
    """
    averaged = bool(read_average(checkpoint, final=_final(cfg)))
    return RunEnd(read_step(checkpoint), cfg["trainer"]["max_steps"], averaged=averaged)


def read_trained_head(cfg: Mapping[str, Any], checkpoint: Path) -> MatchingHead | None:
    """The matching head of a run's checkpoint; None without one.

    Raises:
        CheckpointError: as `read_head`.
    """
    found = find_head(cfg)
    if found is None:
        return None
    if average := read_average(checkpoint, final=_final(cfg)):
        return head_of_state(average, name=found.name, text_expert=found.text_expert)
    return read_head(checkpoint, name=found.name, text_expert=found.text_expert)


def _final(cfg: Mapping[str, Any]) -> str:
    return str(cfg["run"].get("final", "last"))


def _of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the parameters of a training module, those of its model."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def export_visual_tokenizer(
    run_folder: Path, *, tokenizer: VisualTokenizer, cfg: Mapping[str, Any], metrics: Mapping[str, float], end: RunEnd
) -> Path:
    """Exports a visual tokenizer to its run's folder; returns the folder written."""
    origin = {**_origin(cfg, describe_run()), "steps": str(end), **metrics}
    pictures = _pictures_of(cfg)
    return save_visual_tokenizer(
        run_folder / EXPORT_FOLDER, tokenizer, pictures=pictures, provenance=origin, overwrite=True
    )


def _pictures_of(cfg: Mapping[str, Any]) -> PicturePolicy:
    return read_policy(cfg["model"].get("pictures") or STANDARD)


def _origin(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    origin = {"run": cfg["run"]["name"], "git_revision": facts["git_revision"], "command": facts["command"]}
    style = cfg["data"].get("heldout_style")  # of the built-in set alone
    return origin if style is None else {**origin, "heldout_style": style}


def _card(cfg: Mapping[str, Any], end: RunEnd, matching: MatchingHead | None) -> CardInfo:
    card = build_card(cfg, steps=str(end))
    if matching is None:
        return card
    use = f"{HEAD_FILE}; it orders retrieved candidates anew: m2-evaluate model=FOLDER rerank=16"
    return dataclasses.replace(card, training={**card.training, "matching head": use})


def read_metrics(
    path: Path, *, step: int | None = None, averaged: bool = False
) -> dict[str, dict[str, dict[str, float]]]:
    """Final metrics of a `summary.json` as split, language, metric; empty if there is none, or it is of other weights.

    Args:
        path: of the file; those of earlier versions do not say their step.
        step: that of the model; None for any.
        averaged: with a step, whether the model is a moving average.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_other = content.get("evaluated_step", content.get("steps", step)) != step
        if step is not None and (is_other or averaged != (content.get("evaluated_weights") == AVERAGE_KEY)):
            return {}
        table = content.get("table", {})
        return {
            split: {
                language: {name: float(value) for name, value in values.items()}
                for language, values in languages.items()
            }
            for split, languages in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; evaluate again with m2-train ... run.resume=auto") from error
