"""Several formats of one model in one folder, which appears whole or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from m2_encoder.checkpoints.exported import CARD_FILE
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.exports.base import ExportFormat, ExportSource
from m2_encoder.exports.native import Native
from m2_encoder.exports.parity import FormatResult, Parity, write_parity
from m2_encoder.files import atomic_folder

_STAGES: Final = ".stages"


def write_export(
    output: Path, *, source: ExportSource, formats: Mapping[str, ExportFormat], overwrite: bool = False
) -> Parity:
    """Writes formats in their order, that of `load` first, tries each, and keeps those that give our features.

    Where the only format is that of `load`, nothing else is written; otherwise also `parity.json` and a card that
    says how to open each. If all formats miss their bounds, there is no folder; `Parity.missed` names those that are
    not in it.

    Raises:
        UserError: if the folder exists, the disk refuses, or a format cannot be written or tried.
    """
    results: list[FormatResult] = []
    taken: dict[Path, str] = {}
    with atomic_folder(output, overwrite=overwrite, error=CheckpointError) as folder:
        (folder / _STAGES).mkdir()
        for name, each in _native_first(formats):
            staged = folder / _STAGES / name
            try:
                each.write(staged, source)
                measured = each.measure(staged, source)
            except UserError as error:
                raise error if isinstance(each, Native) else error.under(f"to.{name}") from error
            found = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
            sizes = {os.fspath(path): (staged / path).stat().st_size for path in found if path.name != CARD_FILE}
            results.append(FormatResult(name, each.bound, measured, sizes, each.usage(source)))
            if results[-1].holds:
                _move(staged, folder, found, taken, name, is_native=isinstance(each, Native))
        shutil.rmtree(folder / _STAGES)
        is_plain = all(isinstance(each, Native) for each in formats.values())
        kept = [each._replace(files=_sizes(folder, each)) if each.holds else each for each in results]
        parity = Parity(kept, None if is_plain else source.milliseconds())
        if len(parity.missed) == len(results):
            raise MissedError(parity)
        if not is_plain:
            write_parity(folder, parity, source.card)
    return parity


def _native_first(formats: Mapping[str, ExportFormat]) -> list[tuple[str, ExportFormat]]:
    """Other formats may add to files of the folder that `load` reads."""
    return sorted(formats.items(), key=lambda item: not isinstance(item[1], Native))


def _move(
    staged: Path, folder: Path, paths: Sequence[Path], taken: dict[Path, str], name: str, is_native: bool
) -> None:
    """Files of a format to their place; those of the folder for `load` may be replaced by others that it reads, too."""
    for path in paths:
        target = folder / path
        if (other := taken.get(path)) is not None and not filecmp.cmp(staged / path, target, shallow=False):
            raise UserError(f"{other} and {name} both write {path}; give them folders of their own", key=f"to.{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / path, target)
        if not is_native:
            taken[path] = name


def _sizes(folder: Path, result: FormatResult) -> dict[str, int]:
    """As they are in the end: a later format may have added to a file."""
    return {path: (folder / path).stat().st_size for path in result.files}


class MissedError(CheckpointError):
    """No format gave the features of the model, so nothing was written; `parity` has the numbers."""

    def __init__(self, parity: Parity) -> None:
        names = ", ".join(each.name for each in parity.results)
        super().__init__(f"{names}: not the features of this model, so nothing was written; see the table")
        self.parity = parity
