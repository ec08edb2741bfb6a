"""`m2-evaluate`: the table of a finished model."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.matching_head import MatchingHead, has_head, read_head
from m2_encoder.config.model_choice import (
    find_path,
    flag_problems,
    is_model_name,
    load_from,
    model_problems,
    number_problems,
    output_problems,
)
from m2_encoder.config.paths import anchor
from m2_encoder.config.problems import Unset
from m2_encoder.config.schema import check_tasks
from m2_encoder.config.signatures import check_targets
from m2_encoder.data.emoji.dataset import EMOJI_SPLITS, EMOJI_STYLES, write_emoji_shards
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.errors import UserError
from m2_encoder.evaluation.suite import print_results, run_tasks, summarize
from m2_encoder.evaluation.tables import open_console
from m2_encoder.evaluation.tasks.base import EvaluationContext
from m2_encoder.evaluation.tasks.rerank import Rerank
from m2_encoder.hub import MissingTokenizer
from m2_encoder.record import describe_run
from m2_encoder.runs.build import build_tasks

EMBEDDED = "emoji"
PROTOCOL = "standard"
"""Every distinct caption is a query, positives are by key; see `evaluation.retrieval.encode_set`."""

_LEAST = 2  # candidates: one alone keeps its place


def check_evaluate(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of m2-evaluate, before the model is loaded."""
    problems = [
        *model_problems(cfg),
        *number_problems(cfg, batch_size=1),
        *flag_problems(cfg, "overwrite"),
        *output_problems(cfg["output"], overwrite=cfg["overwrite"]),
        *rerank_problems(cfg),
        *(problem.text for problem in check_tasks(cfg["evaluation"])),
        *(problem.text for problem in check_targets(cfg, given={}, skip=lambda _: False)),
    ]
    data = cfg["data"]
    if isinstance(data, Unset):
        return problems
    if data != EMBEDDED and not find_path(str(data)).is_dir():
        problems.append(f"data={data}: no such folder; give {EMBEDDED} or a folder of WebDataset tars")
    if cfg["heldout_style"] not in EMOJI_STYLES:
        problems.append(f"heldout_style={cfg['heldout_style']}: choose from {', '.join(EMOJI_STYLES)}")
    splits = cfg["splits"]
    unknown = [name for name in splits if name not in EMOJI_SPLITS] if isinstance(splits, list) else [splits]
    if unknown or not splits:
        problems.append(f"splits={splits}: must be a list of {', '.join(EMOJI_SPLITS)}")
    return problems


def rerank_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with `rerank`, without loading anything."""
    candidates, model, weights = cfg["rerank"], cfg["model"], cfg["weights"]
    if candidates is None:
        return []
    if not isinstance(candidates, int) or isinstance(candidates, bool) or candidates < _LEAST:
        return [
            f"rerank={candidates}: must be null, or a whole number of at least {_LEAST}: how many candidates of each "
            "query are ordered anew"
        ]
    fix = (
        "train with the objective itm (m2-train +experiment=r2d2 does), export that run again with "
        "m2-export run.name=NAME overwrite=true and give its export as the model, or leave rerank out"
    )
    if weights is not None or is_model_name(model):
        given = f"weights={weights}" if weights is not None else f"model={model}"
        return [f"rerank={candidates}: {given} brings no matching head, only a folder of m2-export does; {fix}"]
    if isinstance(model, Unset) or not isinstance(model, str) or not (find_path(model) / CONFIG_FILE).is_file():
        return []  # which is reported for the model
    try:
        return [] if has_head(find_path(model)) else [f"rerank={candidates}: {model} has no matching head; {fix}"]
    except UserError as error:
        return [str(error)]


def run_evaluate(cfg: dict[str, Any]) -> None:
    """Prints the tables and writes the numbers.

    Raises:
        UserError: for a model or a set that cannot be used, or a place that takes no numbers.
    """
    started = time.time()
    console = open_console()
    loaded = load_from(cfg)
    if isinstance(loaded.tokenizer, MissingTokenizer):
        loaded.tokenizer()  # says what to give
    tasks = build_tasks(cfg["evaluation"])
    if cfg["rerank"] is not None:
        tasks["retrieval"] = Rerank(candidates=cfg["rerank"])
    with console.status("evaluating"):
        context = EvaluationContext(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            sets=_read_sets(cfg, EvalTransform(loaded.model.config.image_size)),
            matching=_read_head(cfg) if any(isinstance(task, Rerank) for task in tasks.values()) else None,
            batch_size=cfg["batch_size"],
        )
        results = run_tasks(tasks, context)
    print_results(console, results, context)
    for name in tasks.keys() - results.keys():
        console.print(f"evaluation: {name} needs what this model does not have, and is left out", highlight=False)
    if cfg["output"] is None:
        return
    report = {
        "model": cfg["model"],
        "data": cfg["data"],
        "protocol": PROTOCOL,
        "rerank": cfg["rerank"],
        **summarize(results),
        "seconds": round(time.time() - started, 3),
        **describe_run(),
    }
    path = _write(cfg["output"], report)
    console.print(f"numbers: {path}", soft_wrap=True, highlight=False)


def _write(output: str, report: Mapping[str, Any]) -> Path:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    path = Path(output).expanduser()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        return partial.replace(path)
    except OSError as error:
        print(text, end="", flush=True)  # what took long to compute is not lost
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = f"cannot be written ({error.strerror or error}); its content is printed above"
        raise UserError(f"output={output}: {reason}") from error


def _read_head(cfg: Mapping[str, Any]) -> MatchingHead | None:
    """Of an exported folder that has one."""
    if cfg["weights"] is not None or is_model_name(cfg["model"]) or not has_head(find_path(cfg["model"])):
        return None
    return read_head(find_path(cfg["model"]))


def _read_sets(cfg: dict[str, Any], transform: EvalTransform) -> dict[str, RetrievalSet]:
    if cfg["data"] != EMBEDDED:
        folder = find_path(cfg["data"])
        name = folder.resolve().name
        return {name: read_retrieval_set(folder, name=name, transform=transform)}
    folder = write_emoji_shards(anchor(cfg["folder"]), heldout_style=cfg["heldout_style"])
    return {
        split: read_retrieval_set(folder / split, name=f"{EMBEDDED}_{split}", transform=transform)
        for split in cfg["splits"]
    }
