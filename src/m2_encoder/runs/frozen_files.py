"""Files that a run reads and never changes, without which its targets would mean something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from m2_encoder.checkpoints.exported import WEIGHTS_FILE
from m2_encoder.config.model_choice import EMBEDDED_TOKENIZER, find_path
from m2_encoder.config.paths import anchor
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import file_sha256, write_json
from m2_encoder.runs.folder import CONFIG_FILE, read_config

FROZEN_FILE: Final = "frozen.json"
"""In the run's folder: digests of those files."""

_SHOWN_DIGITS: Final = 12


class Frozen(NamedTuple):
    """A file that a run reads and never changes.

    Attributes:
        key: of the setting that names it.
        value: of that setting.
        path: the file.
        sha256: of its content.
    """

    key: str
    value: str
    path: Path
    sha256: str


class _Place(NamedTuple):
    """Where a file lies, and which setting says so."""

    key: str
    value: str
    path: Path


def digest_frozen(cfg: Mapping[str, Any]) -> dict[str, Frozen]:
    """Reads the files that give a run's ids, codes and teachers their meaning.

    Args:
        cfg: the resolved configuration.

    Returns:
        By what they are, which is the key of a setting. A file that is not there is left for whoever loads it.
    """
    return {
        what: Frozen(*place, file_sha256(place.path)) for what, place in _places(cfg).items() if place.path.is_file()
    }


def _places(cfg: Mapping[str, Any]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    if cfg.get("task") is None and (tokenizer := str(cfg["model"]["tokenizer"])) != EMBEDDED_TOKENIZER:
        found["model.tokenizer"] = _Place("model.tokenizer", tokenizer, anchor(tokenizer))
    for name, node in counting_nodes(cfg).items():
        key = f"objective.{name}.teacher"
        if (weights := node.get("teacher_weights")) is not None:
            found[key] = _Place(f"{key}_weights", str(weights), find_path(str(weights)))
        elif (teacher := node.get("teacher")) is not None:
            found[key] = _Place(key, str(teacher), find_path(str(teacher)) / WEIGHTS_FILE)
        if (folder := (node.get("targets") or {}).get("tokenizer")) is not None:
            key = f"objective.{name}.targets.tokenizer"
            found[key] = _Place(key, str(folder), find_path(str(folder)) / WEIGHTS_FILE)
    return found


def check_frozen(cfg: Mapping[str, Any], folder: Path, *, resumes: bool) -> dict[str, Frozen]:
    """Refuse to go on with other files than a run began with, wherever they lie.

    Args:
        cfg: the resolved configuration.
        folder: the run's, which holds the digests of before.
        resumes: whether the run goes on.

    Returns:
        What `write_frozen` keeps; nothing on all ranks but the first, which alone reads the files.

    Raises:
        UserError: naming the first that differs.
    """
    if not is_first_rank():
        return {}
    frozen = digest_frozen(cfg)
    if not resumes:
        return frozen
    before = _read_record(folder / FROZEN_FILE)
    places = _places(read_config(folder / CONFIG_FILE)) if (folder / CONFIG_FILE).is_file() else {}
    for what, (key, value, path, sha256) in frozen.items():
        if what in before:
            origin, then = before[what]["file"], f" (sha256 {before[what]['sha256'][:_SHOWN_DIGITS]})"
            same = before[what]["sha256"] == sha256
        else:  # the run began before there were digests, or without this file: the same place must do
            origin, then = str(places[what].path.resolve()) if what in places else "", ""
            same = origin in ("", str(path.resolve()))
        if not same:
            raise UserError(
                f"{key}={value}: {path} (sha256 {sha256[:_SHOWN_DIGITS]}) is not the file that this run began with, "
                f"{origin}{then}: what it learns would change its meaning; restore that file, or give another run.name"
            )
    return frozen


def write_frozen(folder: Path, frozen: Mapping[str, Frozen], *, resumes: bool) -> None:
    """Keep what a run reads, beside what it read before if it goes on."""
    before = _read_record(folder / FROZEN_FILE) if resumes else {}
    now = {what: {"file": str(each.path.resolve()), "sha256": each.sha256} for what, each in frozen.items()}
    if before or now:
        write_json(folder / FROZEN_FILE, {**before, **now})
    else:
        (folder / FROZEN_FILE).unlink(missing_ok=True)


def counting_nodes(cfg: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Objectives with a weight, of a resolved configuration."""
    nodes = (cfg.get("objective") or {}).items()
    return {name: node for name, node in nodes if isinstance(node, Mapping) and node.get("weight", 1.0)}


def _read_record(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {what: {"file": str(each["file"]), "sha256": str(each["sha256"])} for what, each in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged; restore it, or start again with another run.name") from error
