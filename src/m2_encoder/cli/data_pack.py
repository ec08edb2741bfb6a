"""`m2-data pack`: folders and tables of pairs to WebDataset tars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from m2_encoder.config.paths import anchor
from m2_encoder.config.problems import Unset, show
from m2_encoder.config.rules import Rule, check_rules, choice, flag, number, text, whole
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.packing.download import DownloadOptions
from m2_encoder.data.packing.encoding import ImageOptions
from m2_encoder.data.packing.pack import FAILURES_FILE, PackOptions, PackSummary, check_pattern, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.shards import ShardResult
from m2_encoder.data.packing.sources import FORMATS, Source, find_source
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

EXIT_FAILURES: Final = 1
_STARTS_WITH_KEY: Final = re.compile(r"[a-z_.]+=")


def optional(rule: Rule) -> Rule:
    """The same rule, which null keeps, too."""
    return rule._replace(holds=lambda value: value is None or rule.holds(value), must=f"{rule.must}, or null")


def source_rule(example: str) -> Rule:
    """A path, a pattern, or a list of them."""

    def holds(value: Any) -> bool:
        items = value if isinstance(value, list) else [value]
        return bool(items) and all(isinstance(item, str) and item.strip() for item in items)

    return Rule("source", holds, "a path, a pattern such as data/*.tar, or a list of them", example)


_RULES: Final[tuple[Rule, ...]] = (
    source_rule("photos"),
    text("output", "tars"),
    optional(choice("format", FORMATS)),
    text("texts", "train_texts.jsonl", optional=True),
    text("image_root", "photos", optional=True),
    *(text(f"columns.{name}", name, optional=True) for name in ("image", "caption", "key", "language")),
    Rule(
        "columns.extra",
        lambda value: isinstance(value, list) and all(isinstance(item, str) and item for item in value),
        "a list of names of columns",
        "[license]",
    ),
    optional(choice("language", LANGUAGES)),
    whole("samples_per_shard", 1, "1000", most=10**6),
    text("pattern", "%06d.tar"),
    whole("max_side", 1, "512", optional=True),
    whole("quality", 1, "90", most=95, optional=True),
    flag("verify"),
    whole("min_side", 1, "4"),
    number("max_aspect", "20", least=1),
    whole("max_pixels", 1, "89478485"),
    whole("threads", 1, "16", most=1024),
    number("timeout_s", "10", above=0),
    whole("retries", 0, "2", most=100),
    flag("retry_remote"),
    whole("workers", 0, "8", most=1024, optional=True),
    number("max_failed_share", "0.1", least=0, most=1),
    flag("overwrite"),
)


def check_pack(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of m2-data pack; looks at names of files, not into them."""
    if not isinstance(cfg["columns"], dict):
        return [f"columns={cfg['columns']}: must be names by role, for example columns.caption=title"]
    problems = [problem.text for problem in check_rules(cfg, _RULES)]
    if problems or any(isinstance(cfg[key], Unset) for key in ("source", "output")):
        return problems
    try:
        check_pattern(cfg["pattern"])
        source = _find(cfg)
        if source.format == "folder" and anchor(cfg["output"]).resolve().is_relative_to(source.paths[0].resolve()):
            raise UserError(
                f"output={cfg['output']}: lies inside of source={cfg['source']}; give a folder outside of it"
            )
    except UserError as error:
        problems.append(_with_key(cfg, error))
    return problems


def run_pack(cfg: dict[str, Any]) -> int:
    """Packs, shows progress, and says what became of the records.

    Raises:
        UserError: as `m2_encoder.data.packing.pack.pack`.
    """
    output = anchor(cfg["output"])
    workers = default_workers() if cfg["workers"] is None else cfg["workers"]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        meter = _Meter(progress)
        try:
            summary = pack(
                _find(cfg), output, _options(cfg), workers=workers, overwrite=cfg["overwrite"], report=meter.add
            )
        except UserError as error:
            raise UserError(_with_key(cfg, error)) from error
    _print_summary(summary, output)
    failed = sum(summary.failed.values())
    return EXIT_FAILURES if failed > cfg["max_failed_share"] * (failed + summary.samples) else 0


def _with_key(cfg: dict[str, Any], error: UserError) -> str:
    """The message, with the source in front where it names no key: what is wrong then is in there."""
    text = str(error)
    return text if _STARTS_WITH_KEY.match(text) else f"source={show(cfg['source'])}: {text}"


class _Meter:
    """Counts what is done on one line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("packing", total=None)
        self._shards = self._samples = self._failed = 0

    def add(self, result: ShardResult) -> None:
        self._shards += 1
        self._samples += result.samples
        self._failed += len(result.failures)
        counts = f"{self._shards:,} shards, {self._samples:,} samples, {self._failed:,} failed"
        self._progress.update(self._task, description=counts)


def _find(cfg: dict[str, Any]) -> Source:
    columns = cfg["columns"] | {"extra": tuple(cfg["columns"]["extra"])}
    root = cfg["image_root"]
    return find_source(
        cfg["source"],
        columns=Columns(**columns, default_language=cfg["language"]),
        format=cfg["format"],
        texts=cfg["texts"],
        image_root=None if root is None else str(Path(root).expanduser()),
    )


def _options(cfg: dict[str, Any]) -> PackOptions:
    return PackOptions(
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
    )


def _print_summary(summary: PackSummary, output: Path) -> None:
    reused = f", {summary.reused:,} of them from an earlier run" if summary.reused else ""
    print(f"{output}")
    print(f"  {summary.samples:,} samples in {summary.shards:,} tars, {summary.num_bytes / 1e6:,.1f} MB{reused}")
    print(f"  captions: {', '.join(f'{count:,} {language}' for language, count in summary.captions.items())}")
    if summary.changed_images:
        print(f"  {summary.changed_images:,} images were reduced or encoded again")
    if summary.failed:
        print(f"  {sum(summary.failed.values()):,} failed, listed in {output / FAILURES_FILE}:")
        for reason, count in sorted(summary.failed.items(), key=lambda item: -item[1]):
            print(f"    {count:>9,} {reason}")
