"""What `m2-export` exports: the model of a run, or one that is a file already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.card import CardInfo, files_section, model_card
from m2_encoder.checkpoints.card_words import OF_ITS_WEIGHTS
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.exported import (
    CARD_FILE,
    CONFIG_FILE,
    FOREIGN_KEYS,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    read_exported,
)
from m2_encoder.checkpoints.formats import read_small_json
from m2_encoder.checkpoints.matching_head import HEAD_FILE, MatchingHead
from m2_encoder.cli.export_mixed import is_mixed, mixed_problems
from m2_encoder.config.model_choice import (
    build_model_config,
    build_tokenizer,
    is_model_name,
    load_from,
    model_problems,
    needs_tokenizer,
    weights_of,
)
from m2_encoder.config.paths import anchor, default_run_folder, find_path
from m2_encoder.config.problems import UNSET
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import CheckpointError, Problem
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.parity import without_formats
from m2_encoder.files import file_sha256, write_json
from m2_encoder.hub import LoadedModel, find_name
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.record import describe_run
from m2_encoder.runs.ending import RunEnd
from m2_encoder.runs.export import EXPORT_FOLDER, export_run, read_facts
from m2_encoder.runs.folder import CONFIG_FILE as RUN_CONFIG
from m2_encoder.runs.folder import LAST_CHECKPOINT, read_run
from m2_encoder.runs.opening import find_checkpoint

_OF_MODELS = ("weights", "tokenizer", "pictures", "adapter")
_CPU = {"device": "cpu"}


def named_checkpoint(cfg: Mapping[str, Any]) -> Path:
    """The checkpoint that is named, or where it would be.

    Raises:
        CheckpointError: if `last` is asked for and none is whole.
    """
    named, folder = str(cfg["checkpoint"]), default_run_folder(dict(cfg))
    return find_checkpoint(folder, named) or (folder / LAST_CHECKPOINT if named == "last" else find_path(named))


def run_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with `run` and `checkpoint`."""
    folder, name = default_run_folder(dict(cfg)), cfg["run"]["name"]
    given = [key for key in _OF_MODELS if cfg[key] is not None]
    problems = [Problem(key, cfg[key], "belongs to model=, not to a run", "leave it out") for key in given]
    try:
        checkpoint = named_checkpoint(cfg)
    except CheckpointError as error:
        return [Problem("checkpoint", cfg["checkpoint"], str(error), "give the path of a whole one")]
    if not (folder / RUN_CONFIG).is_file():
        names = sorted(path.parent.name for path in folder.parent.glob(f"*/{RUN_CONFIG}"))
        known = f"; there is: {', '.join(names)}" if names else ""
        problems.append(Problem("run.name", name, f"no run in {folder}{known}", "train it first with m2-train"))
    elif read_run(folder / RUN_CONFIG).get("task") is not None:
        rule = "trained no encoder but what task= names"
        fix = f"m2-train exports that itself, to {folder / EXPORT_FOLDER}, unless run.export=false"
        return [Problem("run.name", name, rule, fix)]
    elif not checkpoint.is_file():
        fix = "give `last` or the path of a checkpoint"
        problems.append(Problem("checkpoint", cfg["checkpoint"], f"no file {checkpoint}", fix))
    elif (owner := checkpoint.resolve().parent.parent) != folder.resolve() and (owner / RUN_CONFIG).is_file():
        # A copy of a checkpoint may lie where no run is.
        elsewhere = "" if owner.parent == folder.resolve().parent else f" run.folder={owner.parent}"
        fix = f"use run.name={owner.name}{elsewhere}"
        problems.append(Problem("checkpoint", cfg["checkpoint"], f"is of the run in {owner}", fix))
    return [*problems, *_output_problems(cfg)]


def source_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with `model` and what belongs to it."""
    problems = mixed_problems(cfg) if is_mixed(cfg) else model_problems({**cfg, **_CPU})
    if cfg["shares"] is not None and not is_mixed(cfg):
        problems.append(Problem("shares", cfg["shares"], "is of several models", "leave it out, or give model=[A,B]"))
    if cfg["run"]["name"] not in (None, UNSET):
        problems.append(Problem("run.name", cfg["run"]["name"], "model is given, too", "give one of them"))
    if cfg["checkpoint"] != "last":
        problems.append(Problem("checkpoint", cfg["checkpoint"], "belongs to a run", "leave it out, or give weights="))
    if cfg["output"] is None:
        problems.append(Problem("output", None, "must be given with model", "add output=FOLDER"))
    if needs_tokenizer(cfg):
        rule = "an export holds the SentencePiece file of its model"
        problems.append(Problem("tokenizer", None, rule, "add tokenizer=FILE"))
    return [*problems, *_output_problems(cfg)]


def output_of(cfg: Mapping[str, Any]) -> Path:
    """The folder to write."""
    return anchor(cfg["output"]) if cfg["output"] else default_run_folder(dict(cfg)) / EXPORT_FOLDER


def _output_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    if (cfg["model"] is not None and cfg["output"] is None) or not output_of(cfg).exists() or cfg["overwrite"]:
        return []
    return [Problem("output", str(output_of(cfg)), "exists already", "add overwrite=true, or give another output")]


def architecture_of(cfg: Mapping[str, Any]) -> M2EncoderConfig:
    """Of the model that is to be exported, before it is read."""
    if cfg["model"] is None:
        return build_model_config(read_run(default_run_folder(dict(cfg)) / RUN_CONFIG)["model"])
    if is_mixed(cfg):
        return read_exported(find_path(cfg["model"][0])).config
    if (name := find_name(cfg["model"])) is not None:
        return NAME_TO_CONFIG[name]
    return read_exported(find_path(cfg["model"])).config


def run_source(
    folder: Path, *, model: M2Encoder, cfg: Mapping[str, Any], end: RunEnd, matching: MatchingHead | None
) -> ExportSource:
    """A run's model."""
    facts = read_facts(folder, cfg=cfg, end=end, matching=matching)
    tokenizer = build_tokenizer(cfg["model"], model.config)
    preprocess = EvalTransform(model.config.image_size, pictures=facts["pictures"])

    def write(output: Path) -> None:
        export_run(folder, model=model, cfg=cfg, end=end, matching=matching, output=output)

    return ExportSource(LoadedModel(model.eval(), preprocess, tokenizer), model_card(model, **facts), write)


def model_source(cfg: dict[str, Any]) -> ExportSource:
    """A model that is a file already: an export as it is, or weights under a name.

    Raises:
        UserError: as `m2_encoder.load`.
    """
    loaded = load_from({**cfg, **_CPU}, adapter=None if cfg["adapter"] is None else find_path(cfg["adapter"]))
    tokenizer = loaded.require_tokenizer()
    folder = find_path(cfg["model"])
    if _is_whole(cfg) and (folder / CARD_FILE).is_file():
        return ExportSource(loaded, (folder / CARD_FILE).read_text(encoding="utf-8"), partial(_copy_native, folder))
    facts: dict[str, Any] = {
        "pictures": loaded.preprocess.pictures,
        "metrics": {},
        "provenance": _origin(cfg),
        "card": CardInfo(licence=OF_ITS_WEIGHTS),
    }
    write = partial(export_model, model=loaded.model, tokenizer=tokenizer, **facts)
    return ExportSource(loaded, model_card(loaded.model, **facts), write)


def _is_whole(cfg: Mapping[str, Any]) -> bool:
    """Whether `model` is an export that is taken as it is."""
    return not is_model_name(cfg["model"]) and all(cfg[key] is None for key in _OF_MODELS)


def _copy_native(folder: Path, output: Path) -> None:
    """Without what other formats have added."""
    output.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, HEAD_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    content = read_small_json(output / CONFIG_FILE)
    own = {key: value for key, value in content.items() if key not in FOREIGN_KEYS}
    if own != content:
        write_json(output / CONFIG_FILE, own)
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    card = without_formats(card) + files_section(output, (WEIGHTS_FILE, TOKENIZER_FILE))
    (output / CARD_FILE).write_text(card, encoding="utf-8")


def _origin(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights come from; no paths of this machine."""
    weights, path = weights_of(cfg)
    facts = describe_run()
    return {
        "model": os.path.basename(str(cfg["model"]).rstrip("/")),
        "weights": weights.rsplit("/", 1)[-1],
        **({"weights_sha256": file_sha256(path)} if path.is_file() else {}),
        **({} if cfg["adapter"] is None else {"adapter": os.path.basename(str(cfg["adapter"]).rstrip("/"))}),
        "git_revision": facts["git_revision"],
        "versions": ", ".join(map(" ".join, facts["versions"].items())),
    }
