"""Layout of an exported model: a folder with configuration, weights, tokenizer and model card.

`config.json` leaves out what a plain model has not (`M2EncoderConfig.to_dict`), so older versions of this package read
every plain model. One with prompts or adapters they refuse by the name of the unknown field, `adapter_width` for
example: without these parts its features would be others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from m2_encoder.checkpoints.formats import read_safetensors_metadata, read_small_json
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import file_sha256
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.pictures import OLDER, PicturePolicy, read_policy

FORMAT = "m2-encoder"
FORMAT_VERSION = 1
VISUAL_TOKENIZER_FORMAT = "m2-visual-tokenizer"
"""Of the other kind of folder, which `checkpoints.visual_tokenizer` writes and reads."""

TOWERS_FORMAT = "m2-two-towers"
"""Of a folder with somebody else's model, which `checkpoints.towers` writes."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"
CARD_FILE = "README.md"

CONFIG_METADATA_KEY = "m2_encoder_config"
"""The weights carry the architecture, too, so that an edit of `config.json` that fits all shapes is noticed."""


READING_METADATA_KEY = "m2_encoder_reading"
"""Of the weights, the same for how texts and pictures are read (`reading_text`); older exports lack it."""

FOREIGN_KEYS = frozenset(
    {
        "architectures", "auto_map", "dtype", "embed_dim", "eos_token_id", "hidden_size", "model_type", "pad_token_id",
        "projection_dim", "text_cfg", "vision_cfg",
    }
)  # fmt: skip
"""Entries of `config.json` that other libraries read."""

_FREE = FOREIGN_KEYS | {"metrics", "provenance"}
"""Entries of `config.json` by which `load` decides nothing."""


class ExportedFolder(NamedTuple):
    """What an exported folder holds, checked but not loaded."""

    config: M2EncoderConfig
    weights: Path  # safetensors file under our names
    tokenizer: Path
    context_length: int  # most tokens of a text, template included
    truncation_side: Literal["left", "right"]  # where a longer text is cut
    normalise: bool | None  # whether white space is tidied; None in older exports, which do not say
    pictures: PicturePolicy  # what the pixels of its training pictures were


def config_text(config: M2EncoderConfig) -> str:
    """The architecture as canonical JSON."""
    return json.dumps(config.to_dict(), sort_keys=True)


def reading_text(content: Mapping[str, Any]) -> str:
    """What decides of a `config.json`, as canonical JSON."""
    return json.dumps({key: value for key, value in content.items() if key not in _FREE}, sort_keys=True)


def read_format(folder: str | os.PathLike[str]) -> str | None:
    """The `format` in the `config.json` of a folder; None if there is none or it cannot be read."""
    try:
        found = read_small_json(Path(folder) / CONFIG_FILE).get("format")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


def read_exported(folder: str | os.PathLike[str]) -> ExportedFolder:
    """Read and check a folder written by `m2_encoder.checkpoints.export.export_model`.

    Raises:
        CheckpointError: if a file is missing, or the files contradict each other.
    """
    folder = Path(folder)
    if read_format(folder) == VISUAL_TOKENIZER_FORMAT:
        raise CheckpointError(f"{folder} is a visual tokenizer, not an encoder; give a folder that m2-export wrote")
    if read_format(folder) == TOWERS_FORMAT:
        rule = "holds somebody else's model, which is built by its own code and evaluated by the run that trained it"
        raise CheckpointError(f"{folder} {rule}; its {CARD_FILE} says how to load it")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete exported model: {', '.join(missing)} missing; write it with m2-export"
        )
    content = read_small_json(folder / CONFIG_FILE)
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: format {content.get('format')!r} version {content.get('format_version')!r}, "
            f"this package reads {FORMAT!r} version {FORMAT_VERSION}; export the model again"
        )
    try:
        config = M2EncoderConfig.from_dict(content["model"])
        facts = content["tokenizer"]
        exported = ExportedFolder(
            config=config,
            weights=folder / WEIGHTS_FILE,
            tokenizer=folder / TOKENIZER_FILE,
            context_length=facts["context_length"],
            truncation_side=facts["truncation_side"],
            normalise=facts.get("normalise"),
            pictures=_pictures_of(content),
        )
        tokenizer_sha256 = facts["sha256"]
    except (KeyError, TypeError, UserError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: damaged or edited ({reason}); export the model again"
        ) from error
    _check_consistent(exported, tokenizer_sha256, content)
    return exported


def find_pictures(weights: str | os.PathLike[str]) -> PicturePolicy | None:
    """The policy of the export that is `weights`, or that this file lies in; None if there is none.

    That may be an encoder's or a visual tokenizer's.

    Raises:
        CheckpointError: if its `config.json` is damaged.
    """
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    if read_format(folder) not in (FORMAT, VISUAL_TOKENIZER_FORMAT, TOWERS_FORMAT):
        return None
    try:
        return _pictures_of(read_small_json(folder / CONFIG_FILE))
    except UserError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: damaged or edited ({error}); export the model again") from error


def read_heldout_style(folder: str | os.PathLike[str]) -> str:
    """The drawing style that training left out, as an export says, or the one in a run's folder; "" if none does."""
    for place in (Path(folder), Path(folder) / "export"):
        if read_format(place) is not None:
            origin = read_small_json(place / CONFIG_FILE).get("provenance")
            return str(origin.get("heldout_style") or "") if isinstance(origin, Mapping) else ""
    return ""


def _pictures_of(content: Mapping[str, Any]) -> PicturePolicy:
    """The policy in a `config.json`; exports from before there was one do not say it."""
    facts = content.get("preprocess")
    return read_policy(facts["pictures"]) if isinstance(facts, Mapping) and "pictures" in facts else OLDER


def _check_consistent(exported: ExportedFolder, tokenizer_sha256: str, content: Mapping[str, Any]) -> None:
    folder = exported.weights.parent
    metadata = read_safetensors_metadata(exported.weights)
    if metadata.get(CONFIG_METADATA_KEY) != config_text(exported.config):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} describes another architecture than {WEIGHTS_FILE} was exported with; "
            "restore it or export the model again (load takes image_size as an argument)"
        )
    if file_sha256(exported.tokenizer) != tokenizer_sha256:
        raise CheckpointError(
            f"{folder}: {TOKENIZER_FILE} is not the file that was exported; restore it or export the model again"
        )
    try:
        before = dict(json.loads(metadata.get(READING_METADATA_KEY, "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{exported.weights}: its metadata is damaged; export the model again") from error
    if (change := _find_change(before, content)) is not None:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} says {change[:200]} than {WEIGHTS_FILE} was exported with; restore it or export "
            "the model again (load takes pictures as an argument)"
        )


def _find_change(before: Mapping[str, Any], content: Mapping[str, Any], above: str = "") -> str | None:
    """The first entry that is not as it was; one that is missing or null is as in older exports."""
    for key, value in content.items() if before else ():
        name, was = f"{above}{key}", before.get(key)
        if isinstance(value, dict) and isinstance(was, dict):
            if (inside := _find_change(was, value, f"{name}.")) is not None:
                return inside
        elif value is not None and value != was and (above or key not in _FREE):
            return f"another {name} ({value!r})"
    return None
