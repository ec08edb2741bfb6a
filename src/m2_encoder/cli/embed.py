"""`m2-embed`: features of a folder of images or of a text file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2_encoder.bounds import Rows, Workers
from m2_encoder.cli.progress import show_encoding
from m2_encoder.config.check import check_settings
from m2_encoder.config.model_choice import load_from, model_problems, needs_tokenizer, weights_of
from m2_encoder.config.output import say
from m2_encoder.config.problems import Unset
from m2_encoder.config.schema import Pictures
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import NOTHING, Problem, UserError, abridge
from m2_encoder.evaluation.embedding import Item, Skipped, embed_images, embed_texts
from m2_encoder.evaluation.feature_file import MAX_NAMES_BYTES, check_feature_path, open_feature_file
from m2_encoder.evaluation.inputs import list_images, read_lines
from m2_encoder.files import file_sha256
from m2_encoder.hub import LoadedModel

EXIT_SKIPPED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """The keys of m2-embed; `conf/commands/embed.yaml` says what they mean."""

    model: Any
    weights: Any
    tokenizer: Any
    pictures: Pictures
    images: Any
    texts: Any
    output: Any
    overwrite: bool
    batch_size: Rows
    num_workers: Workers
    device: Any


def check_embed(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-embed, before the model is loaded."""
    problems = [*model_problems(cfg), *check_settings(EmbedSettings, cfg)]
    images, texts, output = cfg["images"], cfg["texts"], cfg["output"]
    if (images is None) == (texts is None):
        given = "neither" if images is None else "both"
        problems.append(Problem("images, texts", NOTHING, f"{given} given", "give images=FOLDER or texts=FILE"))
    if images is not None and not (folder := Path(str(images)).expanduser()).is_dir():
        rule = "is a file; give the folder it is in" if folder.is_file() else "no such folder"
        problems.append(Problem("images", images, rule))
    if texts is not None and not Path(str(texts)).expanduser().is_file():
        problems.append(Problem("texts", texts, "no such file", "give a UTF-8 file with one text per line"))
    if texts is not None and needs_tokenizer(cfg):
        rule = "texts need the SentencePiece file of a named model"
        problems.append(Problem("tokenizer", None, rule, "add tokenizer=FILE"))
    if not isinstance(output, Unset):
        path = Path(str(output)).expanduser()
        refused = check_feature_path(path, overwrite=cfg["overwrite"] is True)
        problems += [Problem("output", str(path), why) for why in refused]
    return problems


def run_embed(cfg: dict[str, Any]) -> int:
    """Writes the features; returns 1 if inputs were skipped.

    Raises:
        UserError: if no input can be used.
    """
    items, total = _list_items(cfg)
    loaded = load_from(cfg)
    model, size, output = loaded.model, cfg["batch_size"], Path(cfg["output"]).expanduser()
    if cfg["texts"] is not None:
        batches = embed_texts(model, items, loaded.require_tokenizer(), batch_size=size)
    else:
        to_uint8, workers = loaded.preprocess.to_uint8, cfg["num_workers"]
        batches = embed_images(model, items, to_uint8, batch_size=size, num_workers=workers)
    skipped: list[Skipped] = []
    done = 0
    with (
        show_encoding() as progress,
        open_feature_file(
            output,
            feature_dim=model.config.feature_dim,
            provenance=_provenance(cfg, loaded),
            overwrite=cfg["overwrite"],
        ) as add,
    ):
        task = progress.add_task("images" if cfg["images"] else "texts", total=total, skipped="")
        for batch in batches:
            if batch.names:
                add(batch.places, batch.names, batch.features)
            done += len(batch.names)
            skipped += batch.skipped
            note = f"[yellow]{len(skipped):,} skipped" if skipped else ""
            progress.update(task, advance=len(batch.names) + len(batch.skipped), skipped=note)
        if not done:
            first = "; ".join(abridge(f"{item.name}: {item.reason}", 100) for item in skipped[:3])
            more = f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
            key = "images" if cfg["images"] is not None else "texts"
            raise UserError(f"nothing could be used: {first}{more}", key=key, value=cfg[key])
    say(f"{done:,} features of {model.config.feature_dim} numbers: {output}")
    if not skipped:
        return 0
    say(f"m2-embed: {len(skipped):,} skipped:", error=True)
    say(*(f"  {item.name}: {item.reason}" for item in skipped), error=True)
    return EXIT_SKIPPED


def _list_items(cfg: dict[str, Any]) -> tuple[Iterator[Item], int]:
    """The inputs and their number.

    Raises:
        UserError: if there are none, or their names do not fit the output.
    """
    if cfg["images"] is not None:
        folder = Path(cfg["images"]).expanduser()
        images = list_images(folder)
        if not images:
            rule = f"no image in it; known suffixes: {', '.join(PICTURE_SUFFIXES)}"
            raise UserError(rule, key="images", value=cfg["images"])
        _check_names_fit(cfg["output"], sum(len(item.name.encode()) for item in images))
        return iter(images), len(images)
    path = Path(cfg["texts"]).expanduser()
    _check_names_fit(cfg["output"], path.stat().st_size)
    total = sum(1 for _ in read_lines(path))
    if not total:
        raise UserError("the file is empty; write one text per line", key="texts", value=cfg["texts"])
    return read_lines(path), total


def _check_names_fit(output: str, num_bytes: int) -> None:
    if output.endswith(".safetensors") and num_bytes > MAX_NAMES_BYTES:
        rule = f"{num_bytes / 2**20:,.0f} MiB of names do not fit the header of safetensors; write .parquet instead"
        raise UserError(rule, key="output", value=output)


def _provenance(cfg: dict[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """Where the features come from; no times or machines, so the same input gives the same bytes."""
    weights, path = weights_of(cfg)
    return {
        "model": cfg["model"],
        "weights": weights,
        "weights_sha256": file_sha256(path) if path.is_file() else None,
        "config": loaded.model.config.to_dict(),
        "images": cfg["images"],
        "pictures": None if cfg["images"] is None else loaded.preprocess.pictures.to_dict(),
        "texts": cfg["texts"],
        "m2_encoder": importlib.metadata.version("m2-encoder"),
    }
