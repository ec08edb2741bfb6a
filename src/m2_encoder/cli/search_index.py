"""`m2-search index`: makes an index of a folder of pictures, or brings one up to date."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Final

from m2_encoder.bounds import Rows, Text, Workers
from m2_encoder.cli.progress import show_encoding
from m2_encoder.config.check import check_settings
from m2_encoder.config.model_choice import (
    arguments_of_load,
    device_of,
    is_model_name,
    model_problems,
    needs_tokenizer,
    runtime_problems,
    takes_files,
)
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import UNSET, Unset, find_problems
from m2_encoder.config.schema import Pictures
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.evaluation.models.base import import_peer
from m2_encoder.picture_search.index import INDEX_FILE, IndexModel, open_index
from m2_encoder.picture_search.model import Runtime, SearchModel, open_search_model
from m2_encoder.picture_search.update import DType, check_index_folder, update_index

EXIT_SKIPPED: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """The keys of m2-search index; `conf/commands/search_index.yaml` says what they mean."""

    photos: Text
    output: Text | None
    model: Any
    weights: Any
    tokenizer: Any
    pictures: Pictures
    dtype: DType
    neighbours: bool | None
    batch_size: Rows
    num_workers: Workers
    device: Any
    runtime: Runtime


def check_index(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-search index, before the model is loaded."""
    problems = check_settings(IndexSettings, cfg)
    if isinstance(cfg["photos"], Unset) or any(problem.key in ("photos", "output") for problem in problems):
        return problems
    photos, output = _places(cfg)
    if not photos.is_dir():
        rule = "is a file; give the folder it is in" if photos.is_file() else "no such folder"
        return [*problems, Problem("photos", cfg["photos"], rule)]
    if not photos.name and cfg["output"] is None:
        return [*problems, Problem("output", None, "must be given for the root of a disk")]
    try:
        check_index_folder(output, photos)
        above = next(parent for parent in (output, *output.parents) if parent.exists())
        if not takes_files(above):
            rule = f"cannot be written: {above} is no folder that you may write to"
            return [*problems, Problem("output", str(output), rule, "give another place")]
        if cfg["neighbours"] is True:
            import_peer("usearch.index", "indexes with a graph of neighbours", extra="usearch")
    except UserError as error:
        return [*problems, *find_problems(error)]
    has_index = (output / INDEX_FILE).is_file()
    if cfg["model"] is None and not has_index:
        fix = "add model=FOLDER, one that m2-export wrote"
        return [*problems, Problem("model", NOTHING, "must be given for a new index", fix)]
    if cfg["model"] is not None:
        problems += model_problems(cfg)
    else:
        given = [key for key in ("weights", "tokenizer", "pictures") if cfg[key] is not None]
        problems += [Problem(key, cfg[key], "belongs to a model; add model=") for key in given]
        problems += [each for each in model_problems({**cfg, "model": UNSET}) if each.key == "device"]
    if needs_tokenizer(cfg):
        problems.append(Problem("tokenizer", None, "words need the SentencePiece file of a named model"))
    return problems or runtime_problems(cfg, of_index=open_index(output).made_by.model if has_index else None)


def run_index(cfg: dict[str, Any]) -> int:
    """Writes the index; returns 1 if pictures were skipped.

    Raises:
        UserError: if no picture can be used.
    """
    photos, output = _places(cfg)
    model = _open_model(cfg, output)
    with show_encoding() as progress:
        task = progress.add_task("pictures", total=None, skipped="", visible=False)

        def report(done: int, total: int, skipped: int) -> None:
            note = f"[yellow]{skipped:,} skipped" if skipped else ""
            progress.update(task, completed=done, total=total, skipped=note, visible=total > 0)

        changes = update_index(
            output,
            photos,
            model,
            dtype=cfg["dtype"],
            neighbours=cfg["neighbours"],
            batch_size=cfg["batch_size"],
            num_workers=cfg["num_workers"],
            report=report,
        )
    count = changes.new + changes.changed + changes.unchanged
    parts = [f"{changes.new:,} new", f"{changes.changed:,} changed", f"{changes.deleted:,} deleted"]
    say(f"{count:,} pictures ({', '.join(parts)}): {os.path.relpath(output)}")
    if not changes.skipped:
        return 0
    say(f"m2-search index: {len(changes.skipped):,} skipped:", error=True)
    say(*(f"  {item.name}: {item.reason}" for item in changes.skipped), error=True)
    return EXIT_SKIPPED


def _places(cfg: dict[str, Any]) -> tuple[Path, Path]:
    """The folder of the pictures, and that of the index."""
    photos = Path(os.path.abspath(os.path.expanduser(cfg["photos"])))
    beside = photos.parent / f"{photos.name}.index"
    output = beside if cfg["output"] is None else Path(cfg["output"]).expanduser()
    return photos, Path(os.path.abspath(output))


def _open_model(cfg: dict[str, Any], output: Path) -> SearchModel:
    """The model that is given, or that of the index."""
    if cfg["model"] is None:
        made_by: IndexModel = open_index(output).made_by
        given: dict[str, Any] = {**made_by._asdict(), "device": device_of(cfg["device"])}
        del given["fingerprint"]
        return open_search_model(**given, runtime=cfg["runtime"])
    model = cfg["model"] if is_model_name(cfg["model"]) else find_path(cfg["model"])
    return open_search_model(model, **arguments_of_load(cfg), runtime=cfg["runtime"])
