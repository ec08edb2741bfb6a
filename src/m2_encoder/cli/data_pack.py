"""`m2-data pack`: folders and tables of pairs to WebDataset tars."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Le
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from m2_encoder.bounds import Aspect, Count, Fraction, Paths, Pixels, Seconds, Text, Workers
from m2_encoder.config.check import check_settings
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, find_patterns
from m2_encoder.config.problems import Unset, find_problems, show
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.packing.download import DownloadOptions
from m2_encoder.data.packing.encoding import ImageOptions
from m2_encoder.data.packing.pack import FAILURES_FILE, PackOptions, PackSummary, check_pattern, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.shards import ShardResult
from m2_encoder.data.packing.sources import Format, Source, find_source
from m2_encoder.data.samples.language import LanguageName, describe_languages, read_language
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import Problem, UserError

EXIT_FAILURES: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """The keys of `columns`."""

    image: Text | None
    caption: Text | None
    key: Text | None
    identity: Text | None
    language: Text | None
    extra: Sequence[Text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSettings:
    """The keys of m2-data pack; `conf/commands/data_pack.yaml` says what they mean."""

    source: Paths
    output: Text
    format: Format | None
    texts: Text | None
    image_root: Text | None
    encoding: Text | None
    columns: ColumnSettings
    classes: Text | None
    templates: Text | dict[Literal["zh", "en"], Text]
    identity: Literal["captions"] | None
    language: LanguageName | None
    samples_per_shard: Annotated[int, Ge(1), Le(10**6)]
    pattern: Text
    max_side: Pixels | None
    quality: Annotated[int, Ge(1), Le(95)] | None
    verify: bool
    min_side: Pixels
    max_aspect: Aspect
    max_pixels: Count
    threads: Annotated[int, Ge(1), Le(1024)]
    timeout_s: Seconds
    retries: Annotated[int, Ge(0), Le(100)]
    retry_remote: bool
    workers: Workers | None
    max_failed_share: Fraction
    overwrite: bool


def check_pack(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data pack; looks at names of files, not into them."""
    problems = check_settings(PackSettings, cfg)
    if problems or any(isinstance(cfg[key], Unset) for key in ("source", "output")):
        return problems
    try:
        check_pattern(cfg["pattern"])
        if cfg["encoding"] is not None:
            _check_encoding(cfg["encoding"])
        source = _find(cfg)
        if cfg["classes"] is not None:
            _with_classes(cfg, source)
        if source.format == "folder" and anchor(cfg["output"]).resolve().is_relative_to(source.paths[0].resolve()):
            inside = f"lies inside of source={cfg['source']}; give a folder outside of it"
            raise UserError(inside, key="output", value=cfg["output"])
    except UserError as error:
        problems += find_problems(_with_key(cfg, error))
    return problems


def run_pack(cfg: dict[str, Any]) -> int:
    """Packs, shows progress, and says what became of the records; raises `UserError` as `pack`."""
    output = anchor(cfg["output"])
    source = _find(cfg)
    source = source if cfg["classes"] is None else _with_classes(cfg, source)
    if source.left_out:
        names = f"{source.left_out[0].name}{' and others' if len(source.left_out) > 1 else ''}"
        said = f"packing the images below {source.paths[0]}, not the rows of {names}: name a table to pack these"
        say(f"m2-data pack: {said}", error=True)
    workers = default_workers() if cfg["workers"] is None else cfg["workers"]
    options = PackOptions(
        samples_per_shard=cfg["samples_per_shard"],
        pattern=cfg["pattern"],
        images=ImageOptions(
            limits=ImageLimits(cfg["max_pixels"], cfg["min_side"], float(cfg["max_aspect"])),
            verify=cfg["verify"],
            max_side_px=cfg["max_side"],
            quality=cfg["quality"],
        ),
        downloads=DownloadOptions(threads=cfg["threads"], timeout_s=cfg["timeout_s"], retries=cfg["retries"]),
        retry_remote=cfg["retry_remote"],
        joins_captions=cfg["identity"] == "captions",
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("packing", total=None)
        done = collections.Counter[str]()

        def report(result: ShardResult) -> None:
            done.update(shards=1, samples=result.samples, failed=len(result.failures))
            counts = f"{done['shards']:,} shards, {done['samples']:,} samples, {done['failed']:,} failed"
            progress.update(task, description=counts)

        try:
            summary = pack(source, output, options, workers=workers, overwrite=cfg["overwrite"], report=report)
        except UserError as error:
            raise _with_key(cfg, error) from error
    _print_summary(summary, output)
    failed = sum(summary.failed.values())
    return EXIT_FAILURES if failed > cfg["max_failed_share"] * (failed + summary.samples) else 0


def _with_key(cfg: dict[str, Any], error: UserError) -> UserError:
    """The error; with the source as its key where it has none: what is wrong then is in there."""
    return error if error.key is not None else UserError(str(error), key="source", value=show(cfg["source"]))


def _find(cfg: dict[str, Any]) -> Source:
    columns = Columns(**cfg["columns"], default_language=cfg["language"] and read_language(cfg["language"]))
    columns = columns._replace(extra=tuple(columns.extra))
    root = cfg["image_root"] and os.path.expanduser(cfg["image_root"])
    return find_source(
        find_patterns(cfg["source"]),
        columns=columns,
        format=cfg["format"],
        texts=cfg["texts"],
        image_root=root,
        encoding=cfg["encoding"],
    )


def _with_classes(cfg: dict[str, Any], source: Source) -> Source:
    from m2_encoder.cli.class_captions import read_classes  # imports torch, which nothing else here needs

    return source._replace(classes=read_classes(cfg, source))


def _check_encoding(name: str) -> None:
    try:
        "".encode(name)
    except LookupError as error:
        rule = "is no encoding that Python knows; common ones are gb18030, utf-16, big5, cp1252"
        raise UserError(rule, key="encoding", value=name) from error


def _print_summary(summary: PackSummary, output: Path) -> None:
    reused = f", {summary.reused:,} of them from an earlier run" if summary.reused else ""
    say(f"{output}")
    say(f"  {summary.samples:,} samples in {summary.shards:,} tars, {summary.num_bytes / 1e6:,.1f} MB{reused}")
    say(f"  captions: {', '.join(f'{count:,} {language}' for language, count in summary.captions.items())}")
    if summary.left_out:
        say(f"  left out: {describe_languages(summary.left_out)}, which are neither Chinese nor English")
    if summary.changed_images:
        say(f"  {summary.changed_images:,} images were reduced or encoded again")
    if summary.failed:
        say(f"  {sum(summary.failed.values()):,} failed, listed in {output / FAILURES_FILE}:")
        ranked = sorted(summary.failed.items(), key=lambda item: -item[1])
        say(*(f"    {count:>9,} {reason}" for reason, count in ranked))
