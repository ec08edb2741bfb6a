"""`m2-data split`: tars to a training and a held-out side that share nothing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from m2_encoder.bounds import Count, Paths, Rule, Seed, Text, Workers
from m2_encoder.config.check import check_settings
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, find_patterns
from m2_encoder.config.problems import Unset
from m2_encoder.curation.split import FAILURES_FILE, GIANT, SplitOptions, describe_largest, split
from m2_encoder.curation.split_groups import By, GlueOptions
from m2_encoder.data.samples.language import LanguageName, describe_languages, list_languages, read_language
from m2_encoder.data.shards.paths import list_shards
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import Problem, UserError
from m2_encoder.types import LANGUAGES

_FolderName = Annotated[
    str, Rule(lambda name: bool(re.fullmatch(r"[^\s./\\][^/\\]*", name)), "a folder's name, without a slash", "val")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideNames:
    """The keys of `names`."""

    train: _FolderName
    val: _FolderName


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """The keys of m2-data split; `conf/commands/data_split.yaml` says what they mean."""

    source: Paths
    output: Text
    val: Annotated[float, Gt(0), Lt(1)]
    by: By
    seed: Seed
    names: SideNames
    near_images: Annotated[int, Ge(0), Le(16)] | None
    near_color: Annotated[int, Ge(0), Le(255)]
    max_repeats: Count | None
    language: LanguageName | None
    max_pixels: Count
    workers: Workers | None
    overwrite: bool


def check_split(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data split; looks at names of files, not into them."""
    problems = check_settings(SplitSettings, cfg)
    if problems or any(isinstance(cfg[key], Unset) for key in ("source", "output")):
        return problems
    try:
        _list_shards(cfg)
    except UserError as error:
        return [Problem("source", cfg["source"], " ".join(str(error).split()))]
    if cfg["names"]["train"].casefold() == cfg["names"]["val"].casefold():
        return [Problem("names", cfg["names"], "both sides have this name", "give two")]
    return []


def run_split(cfg: dict[str, Any]) -> int:
    """Splits, shows progress, and says what is where; raises `UserError` as `split`."""
    output = anchor(cfg["output"])
    options = SplitOptions(
        share=float(cfg["val"]),
        by=cfg["by"],
        seed=cfg["seed"],
        names=(cfg["names"]["train"], cfg["names"]["val"]),
        glue=GlueOptions(near_images=cfg["near_images"], near_color=cfg["near_color"], max_repeats=cfg["max_repeats"]),
        language=cfg["language"] and read_language(cfg["language"]),
        max_pixels=cfg["max_pixels"],
    )
    bars: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(f"{stage} tars", total=total)
            progress.update(bars[stage], completed=done)

        workers = default_workers() if cfg["workers"] is None else cfg["workers"]
        result = split(_list_shards(cfg), output, options, workers=workers, overwrite=cfg["overwrite"], report=advance)
    say(f"{output}{': was finished already; nothing to do' if result.was_finished else ''}")
    _print_record(result.record, output)
    return 0


def _list_shards(cfg: dict[str, Any]) -> list[str]:
    return list_shards(find_patterns(cfg["source"]), refuse_urls="a split reads local files; download the shards first")


def _print_record(record: dict[str, Any], output: Path) -> None:
    total = record["samples"]
    train, val = record["names"]
    for name, side in record["sides"].items():
        wanted = f", {record['share']:.4g} wanted" if name == val else ""
        say(f"  {name}: {side['samples']:,} samples ({side['share']:.4f}{wanted}) in {side['tars']:,} tars")
        captions = ", ".join(
            f"{count:,} {language} on {side['samples_with'][language]:,} samples"
            for language, count in side["captions"].items()
            if language in LANGUAGES
        )
        others = {language: count for language, count in side["captions"].items() if language not in LANGUAGES}
        say(f"    captions: {captions or 'none'}{f'; others: {describe_languages(others)}' if others else ''}")
    say(f"  {total:,} samples are {record['groups']:,} groups that stay together")
    for kind, count in record["glued"].items():
        say(f"    {count:>9,} samples share {'an' if kind == 'identity' else 'a'} {kind} with another one")
    shared = record["on_both_sides"]
    is_frequent = shared["captions"] and record["max_repeats"] is not None
    why = f" (those of more than {record['max_repeats']:,} samples)" if is_frequent else ""
    say(f"  on both sides: {', '.join(f'{count:,} {what}' for what, count in shared.items())}{why}")
    if record["unusable"]:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in record["unusable"].items())
        say(f"  left out as unusable, listed in {output / FAILURES_FILE}: {counts}")
    spoken = record["sides"][val]["captions"]
    if missing := [language for language in record["sides"][train]["captions"] if language not in spoken]:
        missing.sort(key=lambda language: language not in LANGUAGES)
        _warn(f"{val} has no caption in {list_languages(missing)}")
    if record["largest_group"] > max(1, GIANT * total):
        _warn(describe_largest(record["largest_group"], total, record["largest_group_shares"]))
    say(f"  use: data.sources.main.shards={output / train} +data.validation.mine={output / val}")


def _warn(text: str) -> None:
    say(f"m2-data split: warning: {text}", error=True)
