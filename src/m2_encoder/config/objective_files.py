"""Files that the objectives of a configuration name: which they are, and whether they are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.checkpoints.exported import CONFIG_FILE, FORMAT, VISUAL_TOKENIZER_FORMAT, WEIGHTS_FILE
from m2_encoder.config.known import Known
from m2_encoder.config.model_choice import NO_ENCODER, format_of, is_model_name
from m2_encoder.config.paths import find_path
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.errors import Problem
from m2_encoder.objectives.base import active
from m2_encoder.objectives.files import START, FileKind


class NamedFile(NamedTuple):
    """A file or folder that an objective owns."""

    key: str  # of the setting that names it
    value: str  # of that setting
    kind: FileKind  # as the objective's class says
    weights: str | None  # value of `<key>_weights`; None where there is none

    @property
    def is_start(self) -> bool:
        """Whether it is the model that the run starts from."""
        return self.kind.content == "encoder" and self.value == START

    def locate(self) -> tuple[str, str, Path]:
        """The file itself, after the key and the value that say where it lies."""
        if self.kind.content == "file":
            return self.key, self.value, find_path(self.value)
        if self.weights is not None:
            return f"{self.key}_weights", self.weights, find_path(self.weights)
        return self.key, self.value, find_path(self.value) / WEIGHTS_FILE


def find_files(objectives: Mapping[str, Any], *, trusted: Collection[str] | None = None) -> list[NamedFile]:
    """The files of all active objectives, null left out.

    The class that `_target_` names says which arguments name a file; so do those of its parts, such as `targets`. Only
    classes of `trusted` are imported; None for all.
    """
    nodes = active({name: node for name, node in objectives.items() if isinstance(node, Mapping)})
    return [file for name, node in nodes.items() for file in _walk(f"objective.{name}", node, trusted)]


def _walk(key: str, node: Mapping[str, Any], trusted: Collection[str] | None) -> Iterator[NamedFile]:
    target = str(node.get("_target_"))
    try:
        is_trusted = trusted is None or target in trusted
        files = getattr(find_target(target), "files", {}) if is_trusted else {}
    except TargetError:
        files = {}  # which is reported for the target
    for argument, kind in files.items():
        value, weights = node.get(argument), node.get(f"{argument}_weights")
        if isinstance(value, str):
            yield NamedFile(f"{key}.{argument}", value, kind, weights if isinstance(weights, str) else None)
    for name, part in node.items():
        if isinstance(part, Mapping):
            yield from _walk(f"{key}.{name}", part, trusted)


def check_files(known: Known) -> Iterator[Problem]:
    """Whether every file that an objective names is there, and of the right kind; none is loaded."""
    nodes = {name: node for name, node in known("objective").items() if isinstance(node, Mapping)}
    checks = {"file": _check_file, "encoder": _check_encoder, "visual tokenizer": _check_visual_tokenizer}
    weights = {name: {**node, "weight": known(f"objective.{name}.weight", 1.0)} for name, node in nodes.items()}
    for file in find_files(weights):
        if known(file.key, None) is None:
            continue
        if not file.is_start:
            yield from checks[file.kind.content](file)
        elif known("model.weights", None) is None:
            rule = "is the model of model.weights, and there is none"
            yield Problem(file.key, file.value, rule, "add model.weights=FOLDER, or give a folder of m2-export")


def _check_file(file: NamedFile) -> Iterator[Problem]:
    path = find_path(file.value)
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        yield Problem(file.key, file.value, "is no regular file (a folder, a pipe or a device)", file.kind.fix)
        return
    try:
        with path.open("rb"):
            pass
        if file.kind.check is not None:
            file.kind.check(path)
    except OSError as error:
        yield Problem(file.key, file.value, str(error.strerror), file.kind.fix)
    except ValueError as error:
        yield Problem(file.key, file.value, str(error))


def _check_encoder(file: NamedFile) -> Iterator[Problem]:
    key, value, folder = file.key, file.value, find_path(file.value)
    if file.weights is not None and not find_path(file.weights).is_file():
        yield Problem(f"{key}_weights", file.weights, "no such file", "give the path of its checkpoint")
    elif is_model_name(value):
        if file.weights is None:
            yield Problem(key, value, "needs its checkpoint", f"add {key}_weights=FILE")
    elif format_of(value) == VISUAL_TOKENIZER_FORMAT:
        yield Problem(key, value, NO_ENCODER)
    elif not (folder / CONFIG_FILE).is_file():
        fix = f"use {key}={Path(value) / 'export'}" if (folder / "export").is_dir() else "give one of m2-export"
        yield Problem(key, value, "no folder with an exported model", fix)


def _check_visual_tokenizer(file: NamedFile) -> Iterator[Problem]:
    key, value, folder = file.key, file.value, find_path(file.value)
    fix = "train one with m2-train +experiment=visual_tokenizer, and give outputs/visual_tokenizer/export"
    if not folder.is_dir():
        yield Problem(key, value, "no such folder", fix)
    elif format_of(value) == FORMAT:
        yield Problem(key, value, "is an encoder, not a visual tokenizer", fix)
    elif not (folder / CONFIG_FILE).is_file():
        inside = f"use {key}={Path(value) / 'export'}" if (folder / "export").is_dir() else fix
        yield Problem(key, value, "no folder with a visual tokenizer", inside)
