"""`m2-evaluate`: the table of a finished model."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.matching_head import MatchingHead, read_head
from m2_encoder.config.command import Command, run_command
from m2_encoder.config.model_choice import (
    find_path,
    flag_problems,
    load_from,
    model_problems,
    number_problems,
    output_problems,
)
from m2_encoder.config.paths import anchor
from m2_encoder.config.problems import Unset
from m2_encoder.data.emoji.dataset import EMOJI_SPLITS, EMOJI_STYLES, write_emoji_shards
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.errors import UserError
from m2_encoder.evaluation.console import open_console
from m2_encoder.evaluation.console_tables import results_table
from m2_encoder.evaluation.tasks.rerank import (
    Results,
    rerank_problems,
    rerank_sets,
    reranked_metrics,
    side_by_side,
    small_galleries,
)
from m2_encoder.evaluation.tasks.showcase import SPLIT_TITLES
from m2_encoder.hub import LoadedModel, MissingTokenizer
from m2_encoder.runs.provenance import command_line, git_revision, machine, versions
from m2_encoder.runs.report import Evaluation, evaluate_sets

EMBEDDED = "emoji"
PROTOCOL = "standard"
"""Every distinct caption is a query, positives are by key; see `evaluation.retrieval.encode_set`."""


def check_evaluate(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of m2-evaluate, before the model is loaded."""
    problems = [
        *model_problems(cfg),
        *number_problems(cfg, batch_size=1),
        *flag_problems(cfg, "overwrite"),
        *output_problems(cfg["output"], overwrite=cfg["overwrite"]),
        *rerank_problems(cfg),
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


def run_evaluate(cfg: dict[str, Any]) -> None:
    """Prints the table and writes the numbers.

    Raises:
        UserError: for a model or a set that cannot be used, or a place that takes no numbers.
    """
    started = time.time()
    console = open_console()
    loaded = load_from(cfg)
    head = None if cfg["rerank"] is None else read_head(find_path(cfg["model"]))
    with console.status("evaluating"):
        sets = _read_sets(cfg, EvalTransform(loaded.model.config.image_size))
        evaluation = evaluate_sets(loaded.model, sets, loaded.tokenizer, batch_size=cfg["batch_size"])
        reranked = None if head is None else _rerank(loaded, head, evaluation, candidates=cfg["rerank"])
    shown = evaluation if reranked is None else _beside(evaluation, reranked)
    console.print(results_table(shown.results, titles=SPLIT_TITLES))
    if reranked is not None:
        for line in small_galleries(evaluation.features, candidates=cfg["rerank"]):
            console.print(line, soft_wrap=True, highlight=False)
    if cfg["output"] is None:
        return
    metrics = evaluation.metrics() | ({} if reranked is None else reranked_metrics(evaluation.sets, reranked))
    report = {
        "model": cfg["model"],
        "data": cfg["data"],
        "protocol": PROTOCOL,
        "rerank": cfg["rerank"],
        "metrics": metrics,
        "table": shown.table(),
        "evaluation": shown.results,
        "seconds": round(time.time() - started, 3),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": machine(),
        "command": command_line(),
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


def _rerank(loaded: LoadedModel, head: MatchingHead, evaluation: Evaluation, *, candidates: int) -> Results:
    assert not isinstance(loaded.tokenizer, MissingTokenizer), "a folder with a head holds a tokenizer"
    head = head._replace(linear=head.linear.to(loaded.model.logit_scale.device))
    return rerank_sets(
        loaded.model, head, evaluation.sets, evaluation.features, loaded.tokenizer, candidates=candidates
    )


def _beside(evaluation: Evaluation, reranked: Results) -> Evaluation:
    """With a row more for each language."""
    return evaluation._replace(results=side_by_side(evaluation.results, reranked))


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


COMMAND = Command(
    name="m2-evaluate",
    config_name="evaluate",
    config_folder="commands",
    summary="Measure how well a model retrieves images and texts in both languages.",
    examples=(
        "m2-evaluate model=outputs/emoji/export data=emoji",
        "m2-evaluate model=outputs/emoji/export data=my_tars output=results.json",
        "m2-evaluate model=outputs/r2d2/export rerank=16   # order the best 16 anew by the matching head",
    ),
    check=check_evaluate,
    run=run_evaluate,
    notes=(
        "Recall at k in percent, ranks as pessimistic as can be: equal scores count against the right item. The chance",
        "row is what a random order would reach. Each caption is a query once; images with its key are all right.",
        "rerank=K: the first K of each query are ordered anew by the matching head that the model's folder holds; the",
        "others stay behind them. Both results are shown. It costs K passes of the vision-language layers per query.",
    ),
)


def main() -> int:
    """Entry point of `m2-evaluate`."""
    return run_command(COMMAND)
