"""The end of a sweep of `m2-train`: a table, a CSV and a picture of what it found."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from m2_encoder.analysis.recorded import read_run
from m2_encoder.analysis.runs import Runs
from m2_encoder.analysis.table import Table
from m2_encoder.config.sweep_jobs import JobOutcome, is_done
from m2_encoder.config.sweeps import swept_values
from m2_encoder.evaluation.tables import open_console
from m2_encoder.runs.report import short_path

TABLE_FILE = "sweep.csv"
PICTURE_FILE = "sweep.png"


def report_sweep(folder: Path, outcomes: Sequence[JobOutcome]) -> None:
    """Prints `run.metric` and the final mean recalls of validation by what varies, with their spread over seeds.

    `sweep.csv` in the sweep's folder has all recalls, a row per run, and `sweep.png` shows what changes them. Trials
    that a search has ended early stand in the tables with what they had reached, and not in the picture.
    """
    done = [each for each in outcomes if is_done(each)]
    runs = Runs([dataclasses.replace(read_run(each.folder), swept=swept_values(each.swept)) for each in done])
    pruned = {each.name for each in done if each.state == "pruned"}
    named = {str(run.settings.get("run.metric")) for run in runs} & {name for run in runs for name in run.metrics}
    shown, kept = (list(dict.fromkeys((*named, *names))) for names in (runs.validation_recalls, runs.recalls))
    if not kept:
        print("m2-train: the jobs measured no recall, so there is no table of them", file=sys.stderr)
        return
    console = open_console()
    console.print()
    table = _mark(runs.table(*shown, over=None), pruned) if pruned else runs.table(*shown)
    console.print(str(table), soft_wrap=True, highlight=False)
    console.print()
    places = [("table", _mark(runs.table(*kept, over=None), pruned).to_csv(folder / TABLE_FILE))]
    runs = Runs([run for run in runs if run.name not in pruned])
    if runs.factors and importlib.util.find_spec("matplotlib") is not None:
        from m2_encoder.analysis.picture import draw_effects

        places.append(("picture", draw_effects(folder / PICTURE_FILE, runs)))
    elif runs.factors:
        print("m2-train: no picture of the sweep without matplotlib: pip install 'm2-encoder[plot]'", file=sys.stderr)
    for what, path in places:
        console.print(f"  {what:<12} {short_path(path)}", soft_wrap=True, highlight=False)


def _mark(table: Table, pruned: Collection[str]) -> Table:
    """A table of runs that says which were pruned, if any was."""
    if not pruned:
        return table
    first, *others = table.columns
    rows = [{**row, "state": "pruned" if row["run"] in pruned else "finished"} for row in table]
    return Table([first, "state", *others], rows)
