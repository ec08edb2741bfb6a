"""`m2-evaluate`: tables of a finished model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from torch.distributed import ProcessGroup

from m2_encoder.bounds import Count, Rows, Rule, Text, Workers
from m2_encoder.checkpoints.exported import CONFIG_FILE, read_heldout_style
from m2_encoder.checkpoints.matching_head import has_head, read_head
from m2_encoder.cli.evaluate_suites import Measured, check_models, measure_suites, refuse_failed
from m2_encoder.config.check import check_settings, check_targets
from m2_encoder.config.emoji_folder import emoji_folder_problems, find_emoji_folder
from m2_encoder.config.model_choice import device_of, is_model_name, load_from, output_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import find_problems
from m2_encoder.config.schema import Pictures, check_tasks
from m2_encoder.data.emoji.dataset import EMOJI_SPLITS, EmojiStyle, Split, write_emoji_shards
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.data.retrieval_source import describe_source
from m2_encoder.distributed.launched import joined_ranks
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import Problem, UserError
from m2_encoder.evaluation.suite import prepare_tasks, print_results, run_tasks, summarize
from m2_encoder.evaluation.tables import open_console
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask
from m2_encoder.evaluation.tasks.rerank import Rerank
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.files import write_json
from m2_encoder.record import describe_run
from m2_encoder.runs.build import build_tasks

if TYPE_CHECKING:
    from rich.console import Console

EMBEDDED = "emoji"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """The keys of m2-evaluate; `conf/commands/evaluate.yaml` says what they mean."""

    model: Any
    weights: Any
    tokenizer: Any
    pictures: Pictures
    data: Text
    folder: Text | None
    heldout_style: EmojiStyle
    splits: Annotated[Sequence[Split], Rule(bool, f"a list of {', '.join(EMOJI_SPLITS)}", "[heldout_style]")]
    output: Any
    overwrite: bool
    rerank: Annotated[Count, Ge(2)] | None
    batch_size: Rows
    num_workers: Workers
    device: Any
    features: Text | None
    page: Text | None
    trust: bool
    evaluation: Mapping[str, Any]


def check_evaluate(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-evaluate, before the model is loaded."""
    problems = [
        *check_models(cfg),
        *check_settings(EvaluateSettings, cfg),
        *output_problems(cfg),
        *check_tasks(cfg["evaluation"]),
        *check_targets(cfg, given={}),
    ]
    if isinstance(cfg["rerank"], int) and all(problem.key != "rerank" for problem in problems):
        problems += rerank_problems(cfg)
    if cfg["evaluation"] == {} and cfg["rerank"] is None:
        problems.append(Problem("evaluation", [], "measures nothing", "choose a task or a suite"))
    data = cfg["data"]
    if data == EMBEDDED and all(problem.key not in ("folder", "heldout_style") for problem in problems):
        problems += emoji_folder_problems("folder", cfg["folder"], {"heldout_style": cfg["heldout_style"]})
    if isinstance(data, str) and data != EMBEDDED:
        problem = describe_source(str(find_path(data)))
        problems += [Problem("data", data, problem, f"or {EMBEDDED}")] if problem else []
    return problems


def rerank_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """Problems of `rerank`, before the model is loaded."""
    candidates, model, weights = cfg["rerank"], cfg["model"], cfg["weights"]
    fix = (
        "train with the objective itm (m2-train +experiment=r2d2 does), export that run again with "
        "m2-export run.name=NAME overwrite=true and give its export as the model, or leave rerank out"
    )
    if weights is not None or is_model_name(model):
        given = f"weights={weights}" if weights is not None else f"model={model}"
        rule = f"{given} brings no matching head, only a folder of m2-export does"
    elif not isinstance(model, str) or not (find_path(model) / CONFIG_FILE).is_file():
        return []  # which is reported for the model
    else:
        rule = f"{model} has no matching head"
        try:
            if has_head(find_path(model)):
                return []
        except UserError as error:
            return find_problems(error)
    return [Problem("rerank", candidates, rule, fix)]


def run_evaluate(cfg: dict[str, Any]) -> None:
    """Prints the tables and writes the numbers.

    Raises:
        UserError: for a model or a set that cannot be used, or an output that cannot be written; of several models,
            after the numbers of the others are printed and written.
    """
    with joined_ranks(device_of(cfg["device"])) as group:
        _evaluate(cfg, group)


def _evaluate(cfg: dict[str, Any], group: ProcessGroup | None) -> None:
    started, is_first = time.time(), is_first_rank()
    console = open_console()
    console.quiet = not is_first
    tasks = build_tasks(cfg["evaluation"])
    suites = {name: task for name, task in tasks.items() if isinstance(task, Suite)}
    report: dict[str, Any] = {"model": cfg["model"]}
    found: Measured | None = None
    with console.status("reading the sets"):
        prepare_tasks(suites, find_path)
    if len(suites) < len(tasks) and is_first:
        report |= _measure_one(cfg, {name: task for name, task in tasks.items() if name not in suites}, console)
    if suites:
        found = measure_suites(cfg, suites, console, group)
        report |= found.to_dict()
    failed: list[Exception] = [] if found is None else [*found.failed]
    try:
        if cfg["output"] is not None and is_first:
            _write(cfg["output"], {**report, "seconds": round(time.time() - started, 3), **describe_run()})
    except UserError as error:
        failed.append(error)
    try:
        if cfg["page"] is not None and found is not None and is_first:
            found.write_page(Path(cfg["page"]).expanduser())
    except UserError as error:
        failed.append(error)
    refuse_failed(failed)


def _measure_one(cfg: dict[str, Any], tasks: dict[str, EvaluationTask], console: Console) -> dict[str, Any]:
    """One model of ours, on sets that are in memory; gives what goes to the output file."""
    loaded = load_from(cfg)
    if remark := _remark_on_style(cfg):
        console.print(remark, style="yellow", soft_wrap=True, highlight=False, markup=False)
    tokenizer = loaded.require_tokenizer()
    if cfg["rerank"] is not None:
        tasks["retrieval"] = Rerank(candidates=cfg["rerank"])
    # A named model, or one with weights of its own, brings no head.
    folder = None if cfg["weights"] is not None or is_model_name(cfg["model"]) else find_path(cfg["model"])
    wants_head = any(isinstance(task, Rerank) for task in tasks.values())
    with console.status("evaluating"):
        matching = read_head(folder) if wants_head and folder is not None and has_head(folder) else None
        context = EvaluationContext(
            model=loaded.model,
            tokenizer=tokenizer,
            sets=_read_sets(cfg, loaded.preprocess),
            matching=matching,
            batch_size=cfg["batch_size"],
        )
        results = run_tasks(tasks, context)
    print_results(console, results, context)
    for name in tasks.keys() - results.keys():
        say(f"evaluation: {name} needs what this model does not have, and is left out")
    return {
        "data": cfg["data"],
        "rerank": cfg["rerank"],
        **({"heldout_style": cfg["heldout_style"]} if cfg["data"] == EMBEDDED else {}),
        **({"remark": remark} if remark else {}),
        "pictures": loaded.preprocess.pictures.to_dict(),
        **summarize(results),
    }


def _write(output: str, report: Mapping[str, Any]) -> None:
    path = Path(output).expanduser()
    try:
        write_json(path, report, key="output")
    except UserError as error:
        print(json.dumps(report, ensure_ascii=False, indent=2), flush=True)  # so that long work is not lost
        error.text += "; its content is printed above"
        raise
    say(f"numbers: {path}")


def _remark_on_style(cfg: Mapping[str, Any]) -> str | None:
    """What to say if the model says that it was trained on drawings of `heldout_style`."""
    if cfg["data"] != EMBEDDED or cfg["weights"] is not None or is_model_name(cfg["model"]):
        return None
    trained = read_heldout_style(find_path(cfg["model"]))
    if trained in ("", cfg["heldout_style"]):
        return None
    return (
        f"warning: no style is unseen here: {cfg['model']} was trained with heldout_style={trained}, "
        f"on drawings of {cfg['heldout_style']}; evaluate it with heldout_style={trained}"
    )


def _read_sets(cfg: dict[str, Any], transform: EvalTransform) -> dict[str, RetrievalSet]:
    if cfg["data"] != EMBEDDED:
        source = find_path(cfg["data"])
        name = source.resolve().name if source.is_dir() else source.stem
        return {name: read_retrieval_set(source, name=name, transform=transform)}
    settings = {"heldout_style": cfg["heldout_style"]}
    folder = write_emoji_shards(find_emoji_folder(cfg["folder"], settings), **settings)
    return {
        split: read_retrieval_set(folder / split, name=f"{EMBEDDED}_{split}", transform=transform, split=split)
        for split in cfg["splits"]
    }
