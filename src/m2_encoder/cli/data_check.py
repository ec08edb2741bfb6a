"""`m2-data check`: whether a source can be trained on, before a training run finds out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from annotated_types import Ge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from m2_encoder.bounds import (
    Aspect,
    Count,
    Fraction,
    Paths,
    Pixels,
    Rows,
    Rule,
    Seconds,
    Text,
    Tokens,
    Workers,
)
from m2_encoder.config.check import check_settings
from m2_encoder.config.job import EXIT_USER_ERROR
from m2_encoder.config.model_choice import output_problems, tokenizer_of
from m2_encoder.config.paths import find_patterns
from m2_encoder.config.problems import UNSET, find_problems
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import check_source, judge_for_training
from m2_encoder.data.inspect.survey import Survey, survey_source
from m2_encoder.data.inspect.tables import print_report
from m2_encoder.data.samples.language import LanguageName, read_language
from m2_encoder.data.shards.paths import list_shards
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.pictures import POLICY_RULE, is_policy, read_policy

_CACHE_BYTES: Final = 2 * 10**11  # far more than a look needs; the folder may be that of training


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurveySettings:
    """The keys that m2-data check and m2-data stats share; `conf/commands/` says what they mean."""

    source: Paths
    full: bool
    max_shards: Count
    samples_per_shard: Count
    batch_size: Annotated[Rows, Ge(2)]
    language: LanguageName | None
    model: Text | None
    tokenizer: Text | None
    context_length: Tokens | None
    decode: bool
    pictures: Annotated[Any, Rule(is_policy, POLICY_RULE, "standard")]
    min_side: Pixels
    max_aspect: Aspect
    max_pixels: Count
    workers: Workers | None
    cache: Text | None
    timeout_s: Seconds
    output: Text | None
    overwrite: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckSettings(SurveySettings):
    """The keys of m2-data check."""

    max_bad_share: Fraction
    json: bool


def check_check(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data check."""
    problems = check_settings(CheckSettings, cfg)
    return [*problems, *output_problems(cfg), *tokenizer_problems(cfg, problems), *source_problems(cfg, problems)]


def tokenizer_problems(cfg: Mapping[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """Whether `model`, `tokenizer` and `context_length` name a tokenizer, or none; empty if their form is wrong."""
    if any(problem.key in ("model", "tokenizer", "context_length") for problem in problems):
        return []
    try:
        tokenizer_of(cfg)
    except UserError as error:
        return find_problems(error)
    return []


def source_problems(cfg: Mapping[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """Whether the source names any file; empty if its form is wrong already."""
    if cfg["source"] is UNSET or any(problem.key in ("source", "cache") for problem in problems):
        return []
    try:
        _list_shards(cfg)
    except UserError as error:
        return [Problem("source", cfg["source"], " ".join(error.text.split()))]
    return []


def _list_shards(cfg: Mapping[str, Any]) -> list[str]:
    how = "say where copies of its shards are kept with cache=FOLDER"
    return list_shards(find_patterns(cfg["source"]), refuse_urls=how if cfg["cache"] is None else None)


def run_check(cfg: dict[str, Any]) -> int:
    """Prints what is in the source; the exit code is 2 if training on it would be pointless.

    Raises:
        UserError: if the source is not there.
    """
    found = survey(cfg, InspectionOptions())
    counted = check_source(found, batch_size=cfg["batch_size"])
    report = judge_for_training(counted, found, max_bad_share=cfg["max_bad_share"])
    if cfg["output"] is not None:
        write_json(Path(cfg["output"]).expanduser(), report.to_dict(), key="output")
    if cfg["json"]:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
    else:
        print_report(open_console(), report, title=title_of(cfg["source"]))
    return EXIT_USER_ERROR if report.problems else 0


def survey(cfg: Mapping[str, Any], options: InspectionOptions) -> Survey:
    """Look at the source of a configuration, with a progress bar."""
    shards = _list_shards(cfg)
    options = options._replace(
        samples_per_shard=None if cfg["full"] else cfg["samples_per_shard"],
        decode=cfg["decode"],
        limits=ImageLimits(cfg["max_pixels"], cfg["min_side"], float(cfg["max_aspect"])),
        pictures=read_policy(cfg["pictures"]),
        language=cfg["language"] and read_language(cfg["language"]),
        tokenizer=tokenizer_of(cfg) or options.tokenizer,
    )
    remote = None
    if cfg["cache"] is not None:
        folder = str(Path(cfg["cache"]).expanduser())
        remote = RemoteShards(folder, max_bytes=_CACHE_BYTES, timeout_s=cfg["timeout_s"], attempts=2)
    count = len(shards) if cfg["full"] else min(len(shards), cfg["max_shards"])
    # Starting processes takes longer than a shard: one shard is read by this one.
    workers = cfg["workers"] if cfg["workers"] is not None else min(default_workers(), count) if count > 1 else 0
    columns = (TextColumn("reading shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=count)
        return survey_source(
            shards,
            options,
            max_shards=count,
            workers=workers,
            remote=remote,
            report=lambda _: progress.advance(task),
        )


def title_of(source: str | Sequence[str]) -> str:
    """What a source is called over its tables."""
    return source if isinstance(source, str) else ", ".join(source)
