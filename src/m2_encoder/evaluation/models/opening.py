"""`open_model`: from a short description to a model that is ready to be measured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.formats import read_small_json
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.evaluation.models.base import EvaluatedModel, ModelFacts, digest_values, refuse_texts
from m2_encoder.evaluation.models.feature_table import FeatureTable, read_named_features
from m2_encoder.evaluation.models.open_clip_model import FOLDER_CONFIG, open_open_clip
from m2_encoder.evaluation.models.own import open_own
from m2_encoder.evaluation.models.sentence_model import MODULES_FILE, open_sentence_transformers
from m2_encoder.evaluation.models.transformers_model import open_transformers
from m2_encoder.files import file_sha256
from m2_encoder.pictures import OFFICIAL, PicturePolicy, read_policy

KINDS: Final = ("open_clip", "hf", "sentence-transformers", "features")
"""What comes before the colon of somebody else's model."""
_HAS_ITS_OWN: Final = "is for models of this project; this one has its own"


def open_model(
    spec: str | os.PathLike[str],
    *,
    name: str | None = None,
    checkpoint: str | None = None,
    weights: str | None = None,
    tokenizer: str | None = None,
    pictures: PicturePolicy | str | Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> EvaluatedModel:
    """A model by what it is called.

    Args:
        spec: what `m2_encoder.load` opens (an exported folder, a run's, a name with `weights`); or, after its kind:
            `open_clip:ARCHITECTURE:TAG_OR_FILE`, `open_clip:FOLDER`; `hf:FOLDER_OR_NAME` for transformers;
            `sentence-transformers:FOLDER`; `features:PICTURES_FILE,TEXTS_FILE`, or the first alone. A folder without
            its kind is recognised by the files in it.
        name: in tables and records; by default the last part of `spec`.
        checkpoint: of a run's folder, as `load` has it.
        weights: a checkpoint, for a name of `load` or an architecture of open_clip.
        tokenizer: a SentencePiece file, for a name of `load`.
        pictures: what the pixels of a file are; by default as `load` chooses it, and for others as they read files:
            alpha dropped, orientation ignored.
        device: of the model.
        trust: whether code that comes with a model of transformers may run.

    Raises:
        UserError: naming what is missing, unknown or refused, and what was expected.
    """
    text = os.fspath(spec)
    kind, place = _find_kind(text)
    called = name or _name_of(place, checkpoint)
    foreign = kind in KINDS
    refused = [("checkpoint", checkpoint), ("tokenizer", tokenizer)]
    for key, value in (*refused, *([("weights", weights)] if kind != "open_clip" else [])):
        if foreign and value is not None:
            raise UserError(_HAS_ITS_OWN, key=key, value=value)
    policy = read_policy(pictures) if pictures is not None else OFFICIAL
    if kind == "features":
        return _open_features(place, name=called)
    if kind == "open_clip":
        opened = open_open_clip(place, name=called, weights=weights, pictures=policy)
    elif kind == "hf":
        opened = open_transformers(place, name=called, pictures=policy, trust=trust)
    elif kind == "sentence-transformers":
        opened = open_sentence_transformers(Path(place).expanduser(), name=called, pictures=policy, trust=trust)
    else:
        opened = open_own(
            place, name=called, checkpoint=checkpoint, weights=weights, tokenizer=tokenizer, pictures=pictures
        )
    return move_model(opened, device)


def move_model(opened: EvaluatedModel, device: str | torch.device) -> EvaluatedModel:
    """The same model on a device.

    Raises:
        UserError: if this machine has none.
    """
    module: Any = opened.model
    if module is None:
        return opened
    try:
        return dataclasses.replace(opened, model=module.to(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"cannot be used: {reason}; try cpu", key="device", value=device) from error


def _find_kind(spec: str) -> tuple[str, str]:
    kind, separator, place = spec.partition(":")
    if separator and kind in KINDS:
        if not place:
            raise UserError(f"names nothing after {kind}:", key="model", value=spec)
        return kind, place
    folder = Path(spec).expanduser()
    if (folder / FOLDER_CONFIG).is_file():
        return "open_clip", spec
    if (folder / MODULES_FILE).is_file():
        return "sentence-transformers", spec
    if (folder / CONFIG_FILE).is_file() and _is_transformers(folder / CONFIG_FILE):
        return "hf", spec
    return "m2", str(folder) if folder.is_dir() else spec


def _is_transformers(path: Path) -> bool:
    try:
        content = read_small_json(path)
    except CheckpointError:
        return False
    return "format" not in content and ("model_type" in content or "architectures" in content)


def _name_of(place: str, checkpoint: str | None) -> str:
    parts = [part for part in place.split(",")[0].rstrip("/").split("/") if part not in ("", "export")]
    named = parts[-1] if parts else place
    return named if checkpoint is None else f"{named}@{Path(checkpoint).stem}"


def _open_features(place: str, *, name: str) -> EvaluatedModel:
    paths = [Path(part).expanduser() for part in place.split(",")]
    if len(paths) > 2:
        raise UserError(f"features:{place}: names {len(paths)} files; expected PICTURES_FILE,TEXTS_FILE")
    files = [read_named_features(path) for path in paths]
    widths = [file.features.shape[1] for file in files]
    if len(set(widths)) > 1:
        raise UserError(f"features:{place}: {widths[0]} numbers a picture, but {widths[1]} a text; expected as many")
    beside = [path.with_suffix(".txt") for path in paths if path.suffix == ".npy"]
    facts = ModelFacts(
        kind="features",
        parameters=0,
        weight_bytes=sum(path.stat().st_size for path in paths),
        embed_dim=widths[0],
        image_size=0,
        context_length=0,
        preprocessing={},
        tokenizing={},
    )
    return EvaluatedModel(
        name=name,
        model=None,
        preprocess=refuse_pictures,
        tokenizer=refuse_texts,
        facts=facts,
        fingerprint=digest_values([file_sha256(path) for path in [*paths, *beside]]),
        table=FeatureTable(files[0], files[1] if len(files) == 2 else None),
        no_texts="" if len(files) == 2 else f"features:{place} names no file of texts; add it after a comma",
    )


def refuse_pictures(_source: object) -> torch.Tensor:
    """In place of the preprocessing of files of features."""
    raise UserError("files of features have no model that encodes other pictures")
