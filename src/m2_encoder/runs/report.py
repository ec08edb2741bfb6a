"""The end of a run: evaluation, the numbers of its training, and where everything lies."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from rich.text import Text
from torch import nn

from m2_encoder.checkpoints.tensors import find_non_finite
from m2_encoder.checkpoints.training_state import AVERAGE_KEY, CHECKPOINT_FOLDER
from m2_encoder.config.paths import is_debug
from m2_encoder.data.emoji.emoji_module import EmojiDataModule
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.masking.batch_masking import BatchMasking, build_masking
from m2_encoder.errors import UserError, abridge
from m2_encoder.evaluation.encode import Tokenize
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.evaluation.suite import SUMMARY_FILE, TABLE_FILE, print_results, run_tasks, summarize, write_results
from m2_encoder.evaluation.tables import open_console
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, RunFacts
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.two_towers import TwoTowers
from m2_encoder.objectives.base import Objective
from m2_encoder.pictures import STANDARD, read_policy
from m2_encoder.record import describe_run
from m2_encoder.runs.ending import Results, RunEnd
from m2_encoder.runs.export import trained_head
from m2_encoder.runs.times import FitTimes
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.callbacks.checkpoint import BEST_NAME
from m2_encoder.training.callbacks.monitors import BestCheckpoint


def report_run(
    tasks: Mapping[str, EvaluationTask],
    *,
    model: nn.Module,
    objectives: Mapping[str, Objective],
    datamodule: lightning.LightningDataModule,
    tokenizer: Tokenize,
    run_folder: Path,
    cfg: Mapping[str, Any],
    end: RunEnd,
    best: BestCheckpoint | None,
    times: FitTimes,
    start: Callable[[], M2Encoder] | None = None,
) -> Results:
    """Evaluates a trained model, prints the tables and says where everything lies. Call it on one rank.

    `summary.json`, `results.md` and pictures in the run's folder are replaced. Returns the final metrics by the
    names of the loggers, such as `val/emoji_heldout_style_zh/t2i_r@10`, and the pictures. `start` loads the model that
    the run started from; None if it started from random weights.

    Raises:
        UserError: if a parameter of the model is not finite, or its features.
    """
    if (broken := find_non_finite(model.state_dict())) is not None:
        advice = "nothing is reported or exported; go on from an earlier checkpoint, or train with a lower optimizer.lr"
        raise UserError(f"the trained model is broken: {broken} holds values that are NaN or infinite; {advice}")
    console = open_console()
    with console.status("evaluating"), times.measuring("evaluation_s"):
        context = EvaluationContext(
            model=model,
            tokenizer=tokenizer,
            sets=getattr(datamodule, "retrieval_sets", dict)(),
            objectives=objectives,
            masking=_masking_of(objectives, model, tokenizer),
            matching=trained_head(objectives),
            run=_run_facts(cfg, run_folder, end, datamodule),
            files=_encoder_of_files(tasks, model, tokenizer, cfg),
            start=start,
        )
        results = run_tasks(tasks, context)
    wall_time_s = round(time.time() - times.started, 3)
    summary = summarize(results)
    training = {
        "throughput": _throughput(run_folder / "metrics.jsonl"),
        "wall_time_s": wall_time_s,
        "timing": times.to_plain(),
    }
    pictures = write_results(
        run_folder, results, summary | _facts_of(end, best) | training | describe_run() | labels_of(cfg)
    )
    print_results(console, results, context)
    console.print()
    for what, text in _progress(end, best, debug=is_debug(cfg)):
        console.print(Text.assemble("  ", (f"{what:<12}", "bold"), f" {text}"), soft_wrap=True)
    for what, path in _places(run_folder, pictures, cfg):
        console.print(Text.assemble("  ", (f"{what:<12}", "bold"), abridge(f" {short_path(path)}")), soft_wrap=True)
    minutes, seconds = divmod(round(wall_time_s), 60)
    console.print(Text.assemble("  ", (f"{'wall time':<12}", "bold"), f" {minutes} min {seconds:02d} s"))
    return Results(dict(summary["metrics"]), pictures, run_folder, end.step)


def _masking_of(objectives: Mapping[str, Objective], model: nn.Module, tokenizer: Tokenize) -> BatchMasking | None:
    if isinstance(model, M2Encoder) and isinstance(tokenizer, SentencePieceTokenizer):
        return build_masking(objectives, tokenizer, model.config)
    return None


def _facts_of(end: RunEnd, best: BestCheckpoint | None) -> dict[str, Any]:
    progress: dict[str, Any] = {"finished": end.is_finished, "steps": end.step, "planned_steps": end.planned}
    if end.reason:
        progress["ended_by"] = end.reason
    if best is not None:
        own = {"file": f"{CHECKPOINT_FOLDER}/{BEST_NAME}", "step": best.step}
        progress["best_checkpoint"] = {**own, "metric": best.monitor, "value": best.value}
        progress["evaluated_step"] = end.taken_step
    if end.averaged:
        progress["evaluated_weights"] = AVERAGE_KEY
    return progress


def labels_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a person has said about a run: its task, tags and notes, as far as there are any."""
    run = _section(cfg, "run")
    return {key: run[key] for key in ("task", "tags", "notes") if run.get(key)}


def _progress(end: RunEnd, best: BestCheckpoint | None, *, debug: bool) -> list[tuple[str, str]]:
    """How far the training got, where that is not as planned, and which step was measured."""
    lines = []
    if not end.is_finished:
        lines.append(("steps", f"{end}; {'the next debug run replaces it' if debug else 'run.resume=auto goes on'}"))
    elif end.step < end.planned:
        lines.append(("steps", str(end)))
    if best is not None:
        taken = "evaluated here" if end.taken is not None else "run.final=best evaluates and exports it"
        lines.append(("best", f"step {best.step:,}: {best.monitor} {best.value:.4g}; {taken}"))
    if end.averaged:
        lines.append(("weights", f"the moving average, of step {end.taken_step:,}"))
    return lines


def _run_facts(
    cfg: Mapping[str, Any], run_folder: Path, end: RunEnd, datamodule: lightning.LightningDataModule
) -> RunFacts:
    data = _section(cfg, "data")
    return RunFacts(
        name=run_folder.name,
        model=str(_section(cfg, "model").get("name") or "model"),
        steps=end.taken_step,
        heldout_style=str(data.get("heldout_style", "")),
        folder=datamodule.folder if isinstance(datamodule, EmojiDataModule) else None,
    )


def _encoder_of_files(
    tasks: Mapping[str, EvaluationTask], model: nn.Module, tokenizer: Tokenize, cfg: Mapping[str, Any]
) -> FeatureEncoder | None:
    """What suites encode their sets with; its features are not kept, as no later run has these weights."""
    if not isinstance(model, M2Encoder | TwoTowers) or not any(isinstance(task, Suite) for task in tasks.values()):
        return None
    pictures = read_policy(cfg["model"].get("pictures") or STANDARD)
    preprocess = EvalTransform(model.config.image_size, pictures=pictures)
    name, style = str(cfg["run"]["name"]), str(_section(cfg, "data").get("heldout_style") or "")
    return FeatureEncoder(wrap_towers(model, preprocess, tokenizer, name=name, heldout_style=style), num_workers=2)


def _throughput(metrics_file: Path) -> dict[str, float]:
    """Last step, samples seen and the median speed, as logged; empty for a run that logged nothing."""
    if not metrics_file.is_file():
        return {}
    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    found: dict[str, float] = {}
    for name in ("step", "samples_seen"):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            found[name] = values[-1]
    speeds = [record["perf/samples_per_s"] for record in records if "perf/samples_per_s" in record]
    if speeds:
        found["samples_per_s"] = round(statistics.median(speeds), 3)
    return found


def _places(run_folder: Path, pictures: list[Path], cfg: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """What the run left, in the order in which people look for it."""
    places = [("picture", picture) for picture in pictures]
    places += [("table", run_folder / TABLE_FILE), ("numbers", run_folder / SUMMARY_FILE)]
    places += [("curves", run_folder / "metrics.jsonl"), ("checkpoints", run_folder / "checkpoints")]
    found = [(what, path) for what, path in places if path.exists()]
    exported = _section(cfg, "run").get("export") and not is_debug(cfg)
    return [*found, ("export", run_folder / "export")] if exported else found


def short_path(path: Path) -> Path:
    """As seen from the working directory, if it lies below that."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _section(cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = cfg.get(name)
    return section if isinstance(section, Mapping) else {}
