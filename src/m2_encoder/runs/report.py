"""The end of a run: evaluation on every reported split, the table, the picture, and where everything lies."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from m2_encoder.config.paths import anchor
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.evaluation.console import open_console
from m2_encoder.evaluation.console_tables import results_table
from m2_encoder.evaluation.encode import FeatureModel, Tokenize
from m2_encoder.evaluation.masked import MaskedResults
from m2_encoder.evaluation.retrieval import SetFeatures, encode_set, evaluate_features
from m2_encoder.evaluation.tables import markdown_table, table_rows
from m2_encoder.evaluation.tasks.masked import masked_metrics, masked_table
from m2_encoder.evaluation.tasks.masked_picture import PICTURE_FILE as MASKED_FILE
from m2_encoder.evaluation.tasks.showcase import SPLIT_TITLES, draw_showcase
from m2_encoder.runs.provenance import command_line, git_revision, machine, peak_memory_bytes, versions

SUMMARY_FILE = "summary.json"
TABLE_FILE = "results.md"
PICTURE_FILE = "retrieval.png"

_LAST_SPLITS = ("val", "val_style", "train")  # for choosing, not for reporting: they come below the others
_FIRST_LANGUAGE = "zh"  # on the left and above, where both are shown
_PICTURE_SIZE_PX = 64  # a gallery of smaller images would be blurred; the files are at least this large


class EvaluatedModule(Protocol):
    """What the report needs of `PretrainModule`."""

    @property
    def model(self) -> FeatureModel:
        """The trained model."""
        ...


class EvaluatedData(Protocol):
    """What the report needs of a datamodule."""

    @property
    def tokenizer(self) -> Tokenize:
        """The model's own."""
        ...

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        """Sets to evaluate, by split."""
        ...


class Evaluation(NamedTuple):
    """Sets, encoded and measured, by split.

    Attributes:
        sets: as read.
        features: of all of it.
        results: by split and language.
    """

    sets: dict[str, RetrievalSet]
    features: dict[str, SetFeatures]
    results: dict[str, dict[str, dict[str, float]]]

    def metrics(self) -> dict[str, float]:
        """Recalls under the names of the loggers: `val/<set>_<language>/t2i_r@10`, percent."""
        return {
            f"val/{self.sets[split].name}_{language}/{name}": value
            for split, languages in self.results.items()
            for language, metrics in languages.items()
            for name, value in metrics.items()
            if "_r@" in name or name == "mean_recall"
        }

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """The numbers of the printed table: by split, then language or "chance"."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for row in table_rows(self.results):
            table.setdefault(row.split, {})[row.language] = row.values
        return table


def evaluate_sets(
    model: FeatureModel, sets: Mapping[str, RetrievalSet], tokenizer: Tokenize, *, batch_size: int = 256
) -> Evaluation:
    """Encodes and measures all sets; the ones that are for reporting come first.

    Args:
        model: on any device.
        sets: by split.
        tokenizer: the model's own.
        batch_size: images or texts per forward pass.
    """
    order = sorted(sets, key=lambda split: split in _LAST_SPLITS)
    features = {}
    for split in order:
        languages = sorted(sets[split].captions, key=lambda language: language != _FIRST_LANGUAGE)
        features[split] = encode_set(model, sets[split], tokenizer, languages=languages, batch_size=batch_size)
    results = {split: evaluate_features(features[split]) for split in order}
    return Evaluation({split: sets[split] for split in order}, features, results)


def report_run(
    *,
    module: EvaluatedModule,
    datamodule: EvaluatedData,
    run_folder: Path,
    cfg: Mapping[str, Any],
    started: float,
    draw_more: Callable[[Mapping[str, RetrievalSet]], object] | None = None,
    measure_more: Callable[[Mapping[str, RetrievalSet]], dict[str, MaskedResults]] | None = None,
) -> dict[str, float]:
    """Evaluates a trained model, prints the table and says where everything lies.

    Writes `summary.json`, `results.md` and `retrieval.png`. Call it on one rank.

    Args:
        module: holds the model.
        datamodule: holds the sets and the tokenizer.
        run_folder: exists; files in it are replaced.
        cfg: the resolved configuration of the run.
        started: `time.time()` when the command started.
        draw_more: makes further pictures of the sets, such as `masked.png`.
        measure_more: says what masked objectives predict on the sets, by split; nothing where there are none.

    Returns:
        Final metrics: recalls in percent, `val/emoji_heldout_style_zh/t2i_r@10` and so on, and what
        `measure_more` found, under the names of `masked_metrics`.

    Raises:
        ValueError: if the model's features are not finite.
    """
    console = open_console()
    with console.status("evaluating"):
        evaluation = evaluate_sets(module.model, datamodule.retrieval_sets(), datamodule.tokenizer)
        masked = {} if measure_more is None else measure_more(evaluation.sets)
    picture = run_folder / PICTURE_FILE
    if evaluation.sets:  # a run on shards alone has none
        draw_showcase(
            picture,
            model=module.model,
            tokenizer=datamodule.tokenizer,
            sets=_with_pictures(evaluation.sets, cfg),
            features=evaluation.features,
            results=evaluation.results,
            subtitle=_subtitle(cfg, run_folder),
            heldout_style=str(_section(cfg, "data").get("heldout_style", "")),
        )
        if draw_more is not None:
            draw_more(evaluation.sets)
        table = markdown_table(evaluation.results, titles=SPLIT_TITLES)
        (run_folder / TABLE_FILE).write_text(table, encoding="utf-8")
    metrics = evaluation.metrics() | masked_metrics(masked, evaluation.sets)
    summary = _summary(evaluation, metrics, run_folder, started) | ({"masked": masked} if masked else {})
    _write_summary(run_folder, summary)
    _print_results(console, evaluation, masked)
    _print_places(console, _places(run_folder, picture, cfg), wall_time_s=summary["wall_time_s"])
    return metrics


def _summary(evaluation: Evaluation, metrics: Mapping[str, float], run_folder: Path, started: float) -> dict[str, Any]:
    return {
        "metrics": dict(metrics),
        "table": evaluation.table(),
        "evaluation": evaluation.results,
        "throughput": _throughput(run_folder / "metrics.jsonl"),
        "wall_time_s": round(time.time() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": machine(),
        "command": command_line(),
    }


def _print_results(console: Console, evaluation: Evaluation, masked: Mapping[str, MaskedResults]) -> None:
    if evaluation.sets:
        console.print()
        console.print(results_table(evaluation.results, titles=SPLIT_TITLES))
    if masked:
        sizes = {split: len(dataset.keys) for split, dataset in evaluation.sets.items()}
        console.print()
        console.print(masked_table(masked, titles=SPLIT_TITLES, num_images=sizes))


def _print_places(console: Console, places: Sequence[tuple[str, Path]], *, wall_time_s: float) -> None:
    console.print()
    for what, path in places:
        console.print(f"  [bold]{what:<12}[/bold] {path}", soft_wrap=True, highlight=False)
    minutes, seconds = divmod(round(wall_time_s), 60)
    console.print(f"  [bold]{'wall time':<12}[/bold] {minutes} min {seconds:02d} s", highlight=False)


def _write_summary(run_folder: Path, summary: Mapping[str, Any]) -> None:
    partial = run_folder / f".{SUMMARY_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(run_folder / SUMMARY_FILE)


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


def _with_pictures(sets: Mapping[str, RetrievalSet], cfg: Mapping[str, Any]) -> dict[str, RetrievalSet]:
    """The same sets with images large enough to look at, where the model takes smaller ones."""
    folder = _section(cfg, "data").get("folder")
    shown = {}
    for split, dataset in sets.items():
        tars = anchor(str(folder)) / split
        if dataset.images.shape[-1] < _PICTURE_SIZE_PX and folder and tars.is_dir():
            larger = read_retrieval_set(tars, name=dataset.name, transform=EvalTransform(_PICTURE_SIZE_PX))
            dataset = larger if larger.keys == dataset.keys else dataset
        shown[split] = dataset
    return shown


def _subtitle(cfg: Mapping[str, Any], run_folder: Path) -> str:
    model = str(_section(cfg, "model").get("name", "model"))
    steps = _section(cfg, "trainer").get("max_steps")
    trained = f", {steps:,} steps" if isinstance(steps, int) else ""
    return f"model {model}{trained}   ·   run {run_folder.name}   ·   queries fixed before training"


def _places(run_folder: Path, picture: Path, cfg: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """What the run left, in the order in which people look for it."""
    places = [
        ("picture", picture),
        ("masked", run_folder / MASKED_FILE),
        ("table", run_folder / TABLE_FILE),
        ("numbers", run_folder / SUMMARY_FILE),
    ]
    places += [("curves", run_folder / "metrics.jsonl"), ("checkpoints", run_folder / "checkpoints")]
    found = [(what, path) for what, path in places if path.exists()]
    if _section(cfg, "run").get("export"):
        found.append(("export", run_folder / "export"))
    return [(what, short_path(path)) for what, path in found]


def short_path(path: Path) -> Path:
    """As seen from the working directory, if it lies below that."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _section(cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = cfg.get(name)
    return section if isinstance(section, Mapping) else {}
