"""What `m2-train` says before the first step: about its data, the contrastive batch, and the objectives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import lightning
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2_encoder.config.problems import refuse_all
from m2_encoder.data.inspect.source_report import SourceReport
from m2_encoder.data.inspect.start_check import describe_problems, to_plain
from m2_encoder.data.inspect.tables import make_table
from m2_encoder.data.webdataset_module import WebDatasetModule
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.distributed.topology import GroupTopology, describe_contrastive_batch, resolve_group_size
from m2_encoder.errors import MAX_ENTRIES, NOTHING, Problem, abridge, abridge_list
from m2_encoder.evaluation.tables import open_console
from m2_encoder.files import write_json
from m2_encoder.objectives.base import LocalObjective, Objective, PairObjective
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.schedule import ever_active
from m2_encoder.runs.folder import CHECK_FILE
from m2_encoder.training.module import PretrainModule
from m2_encoder.types import LANGUAGES

_MAX_NAME: Final = 40  # characters of a source in a table


def describe_temperature(model: Mapping[str, Any], module: lightning.LightningModule) -> list[str]:
    """That weights bring their temperature, and that a setting for it would change nothing; `model` as it was given."""
    found = module.initial_temperature() if isinstance(module, PretrainModule) else None
    if found is None:
        return []
    given = model.get("initial_temperature")
    idle = "" if given is None else f"; model.initial_temperature={given} changes nothing"
    return [f"starts from the temperature of the weights, {found:.3g} (a scale of {1 / found:.3g}){idle}"]


def check_data(datamodule: lightning.LightningDataModule, folder: Path, *, resumes: bool) -> dict[str, Any] | None:
    """Look into the sources of a run, in the first of its processes, and print what is there.

    Args:
        datamodule: of the run; others than `WebDatasetModule` are not looked into.
        folder: the run's; nothing is written.
        resumes: whether a run is continued; the same sources are then not looked at again.

    Returns:
        What `write_check` keeps; None if nothing was looked at.

    Raises:
        UserError: if a source cannot be read, or training on it would be pointless; all reasons at once.
    """
    if not isinstance(datamodule, WebDatasetModule) or not datamodule.is_checked_at_start:
        return None
    if not is_first_rank():
        datamodule.skip_check()
        return None
    if resumes and _was_checked(folder / CHECK_FILE, datamodule.manifest.fingerprint()):
        datamodule.check_order(resumes=True)
        datamodule.skip_check()
        return None
    reports = datamodule.check_sources()
    refuse_all([Problem("", NOTHING, problem) for problem in describe_problems(reports)])
    console = open_console()
    console.print(_table(reports))
    samples = sum(report.samples for report in reports.values())
    print(describe_passes(samples, steps=datamodule.max_steps, batch_size=datamodule.global_batch_size))
    _print_warnings(console, reports)
    datamodule.check_order(resumes=resumes)
    return {"manifest": datamodule.manifest.fingerprint(), "sources": to_plain(reports)}


def describe_passes(samples: int, *, steps: int, batch_size: int) -> str:
    """How often a run meets its samples, and the steps that would meet all of them once, if it does not."""
    drawn = steps * batch_size
    line = f"{steps:,} steps of {batch_size:,} pass {drawn / max(samples, 1):,.1f} times over {samples:,} samples"
    return line if drawn >= samples else f"{line}; once takes trainer.max_steps={math.ceil(samples / batch_size)}"


def write_check(folder: Path, check: Mapping[str, Any] | None) -> None:
    """Keep what was found beside the run."""
    if check is not None:
        write_json(folder / CHECK_FILE, check)


def _was_checked(path: Path, manifest: Mapping[str, str]) -> bool:
    try:
        return bool(json.loads(path.read_bytes())["manifest"] == manifest)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged by whoever
        return False


class FirstStep(lightning.Callback):
    """Writes the files that say what a run is, once its first step is done.

    So a start that fails before, or is refused, leaves the files of an earlier start as they were. They are there
    before any checkpoint is: Lightning calls those who save after all other callbacks.

    `write` does it; called once, on the first rank.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write: Callable[[], None] | None = write
        self._begun = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the step that the run goes on from."""
        self._begun = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, after the first update."""
        if trainer.global_step > self._begun:
            self.pass_by(trainer)

    def pass_by(self, trainer: lightning.Trainer) -> None:
        """Write, if that has not been done."""
        if self._write is not None and trainer.is_global_zero:
            self._write()
        self._write = None


def describe_start(
    cfg: Mapping[str, Any], objectives: Mapping[str, Objective], *, world_size: int, ranks_per_node: int
) -> list[str]:
    """Lines about what is trained: the contrastive batch, and what works but may not be meant."""
    lines = []
    is_sized = isinstance(cfg["data"].get("global_batch_size"), int)  # which other people's data need not say
    if is_sized and any(not isinstance(objective, LocalObjective) for objective in objectives.values()):
        lines.append(describe_batch(cfg, world_size=world_size, ranks_per_node=ranks_per_node))
    return [*lines, *_find_pauses(cfg, objectives), *_find_blind_choices(cfg, objectives)]


def describe_batch(cfg: Mapping[str, Any], *, world_size: int, ranks_per_node: int) -> str:
    """The contrastive batch of a configuration in words."""
    strategy = cfg["strategy"]
    group_size = resolve_group_size(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        group_size=strategy.get("group_size"),
        group_nodes=strategy.get("group_nodes"),
    )
    return describe_contrastive_batch(
        GroupTopology(world_size, group_size),
        micro_batches=strategy.get("micro_batches", 1),
        rows_per_rank=cfg["data"]["global_batch_size"] // world_size,
    )


def _table(reports: Mapping[str, SourceReport]) -> Table:
    languages = [f"{name} (length)" for name in LANGUAGES]
    tokens = ("cut", "bytes") if any(report.tokens for report in reports.values()) else ()
    table = make_table("source", "samples", "read", "usable", *languages, *tokens, "pixels", "repeated", "false neg.")
    table.columns[0].overflow = "fold"
    shown = list(reports.items())
    if len(shown) > MAX_ENTRIES:
        shown = shown[: MAX_ENTRIES - 1]
    for name, report in shown:
        table.add_row(
            Text(abridge(name, _MAX_NAME)),
            f"{'' if report.is_whole else 'about '}{report.samples:,}",
            f"{report.inspected:,}",
            f"{report.usable_share:.1%}",
            *(_describe_captions(report, language) for language in LANGUAGES),
            *(_describe_tokens(report) if tokens else ()),
            f"{report.width[2]:.0f}x{report.height[2]:.0f}" if report.usable else "-",
            f"{report.captions.share:.1%}",
            f"{report.false_negatives.share_of_rows:.1%}",
        )
    if len(shown) < len(reports):
        table.add_row(f"… and {len(reports) - len(shown):,} more")
    return table


def _describe_captions(report: SourceReport, language: str) -> str:
    found = report.languages.get(language)
    return "-" if found is None else f"{found.samples / report.usable:.0%} ({found.characters[2]:.0f})"


def _describe_tokens(report: SourceReport) -> tuple[str, str]:
    """Share of captions that the context cuts, and of tokens that are bytes or unknown."""
    found = [] if report.tokens is None else report.tokens.languages.values()
    if not found:
        return "-", "-"
    cut, captions, foreign, tokens = (
        sum(getattr(own, name) for own in found) for name in ("cut", "captions", "foreign", "tokens")
    )
    return f"{cut / captions:.1%}", f"{foreign / max(1, tokens):.1%}"


def _print_warnings(console: Console, reports: Mapping[str, SourceReport]) -> None:
    lines = [
        f"data.sources.{name}: warning: {warning}" for name, report in reports.items() for warning in report.warnings
    ]
    for line in abridge_list(lines):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def _find_pauses(cfg: Mapping[str, Any], objectives: Mapping[str, Objective]) -> Iterator[str]:
    """Objectives of which nothing would come: said and not refused, so that a long run can be tried for a few steps."""
    steps = cfg["trainer"]["max_steps"]
    for name, objective in objectives.items():
        if objective.schedule is not None and not ever_active(objective.schedule, steps):
            yield f"objective.{name} never counts: its schedule is 0 at all steps before trainer.max_steps={steps}"


def _find_blind_choices(cfg: Mapping[str, Any], objectives: Mapping[str, Objective]) -> Iterator[str]:
    """Objectives that choose by similarities of features which are random and stay so."""
    trained = any("features" in objective.trained_parts() for objective in objectives.values())
    if trained or cfg["model"].get("weights") is not None:
        return
    for name, objective in objectives.items():
        is_attentive = isinstance(objective, MaskedImage) and objective.patch_ratio is None
        if is_attentive or isinstance(objective, PairObjective):
            yield (
                f"objective.{name} chooses {'patches' if is_attentive else 'hard negatives'} by features that nothing "
                "in this run trains; add itc to objective=[...], or start from model.weights"
            )
