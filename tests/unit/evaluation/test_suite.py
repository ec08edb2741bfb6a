"""What the suite makes of the results of tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.suite import print_results, run_tasks, summarize, write_results
from m2_encoder.evaluation.tables import ResultRow, ResultTable
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.evaluation.tasks.reconstruction import Reconstruction
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.training import make_tokenizer, tiny_config


class Says(EvaluationTask):
    """Says what it is told."""

    def __init__(self, **found: object) -> None:
        self._found = TaskResult(**{"metrics": {}, **found})  # type: ignore[arg-type]

    def measure(self, context: EvaluationContext) -> TaskResult:
        return self._found


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    tokenizer = make_tokenizer()
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    captions = {"en": ("a", "b"), "zh": ("甲", "乙")}
    sets = {
        name: RetrievalSet(f"my_{name}", ("a", "b"), images, captions, split)
        for name, split in (("train", "train"), ("val", "val"), ("mine", ""), ("heldout_style", ""))
    }
    return EvaluationContext(M2Encoder(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer, sets)


def test_sets_for_reporting_come_first(context: EvaluationContext) -> None:
    assert list(context.sets) == ["mine", "heldout_style", "train", "val"]
    assert list(context.features["val"].texts) == ["zh", "en"]
    assert context.metric("val", "zh", "x") == "val/my_val_zh/x"


def test_titles_say_what_a_set_is_not_what_its_folder_is_called(context: EvaluationContext) -> None:
    assert context.titles["val"] == "validation: unseen concepts"
    assert context.titles["heldout_style"] == "heldout_style"


def test_results_are_merged_written_and_printed(context: EvaluationContext, tmp_path: Path) -> None:
    table = ResultTable("Things", ("what", "number"), [ResultRow("val", ("it", "7"))])
    tasks = {
        "one": Says(metrics={"a": 1.0}, rows=[table, "a line"], record={"more": [2]}, markdown="# one\n"),
        "none": Reconstruction(),
        "two": Says(metrics={"b": 3.0}, markdown="# two\n", pictures={"p.png": lambda path: path.write_bytes(b"x")}),
    }
    results = run_tasks(tasks, context)
    assert list(results) == ["one", "two"], "a task for other models is left out"
    summary = summarize(results)
    assert summary == {"metrics": {"a": 1.0, "b": 3.0}, "more": [2]}
    assert write_results(tmp_path, results, summary) == [tmp_path / "p.png"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "results.md").read_text() == "# one\n\n# two\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "results.md", "summary.json"]
    console = Console(width=80)
    with console.capture() as shown:
        print_results(console, results, context)
    lines = [line.split() for line in shown.get().splitlines()]
    assert ["validation:", "unseen", "it", "7"] in lines
    assert ["2", "images"] in lines
    assert lines[-1] == ["a", "line"]


@pytest.mark.parametrize("found", [{"metrics": {"a": 1.0}}, {"record": {"a": 1}}, {"pictures": {"a": print}}])
def test_tasks_do_not_overwrite_each_other(context: EvaluationContext, found: dict[str, object]) -> None:
    with pytest.raises(UserError, match="a is measured by one and by two; choose one of them"):
        run_tasks({"one": Says(**found), "two": Says(**found)}, context)
