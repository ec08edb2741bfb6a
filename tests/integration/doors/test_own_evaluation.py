"""An evaluation task of the user's own: a class and a YAML file outside of the package, and no change inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from m2_encoder.cli.commands import EVALUATE, TRAIN
from m2_encoder.config.command import Command
from tests.integration.doors.conftest import Own, Train

TASK = """
    from m2_encoder.evaluation.tables import ResultRow, ResultTable
    from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult


    class ModalityGap(EvaluationTask):
        '''Distance between the mean of the images and the mean of the texts, which are all of length 1.'''

        def __init__(self, *, digits: int = 2) -> None:
            self._digits = digits

        def measure(self, context: EvaluationContext) -> TaskResult:
            metrics, rows = {}, []
            for split, features in context.features.items():
                for language, texts in features.texts.items():
                    gap = float((features.image_features.mean(dim=0) - texts.features.mean(dim=0)).norm())
                    metrics[context.metric(split, language, "modality_gap")] = gap
                    rows.append(ResultRow(split, (language, f"{gap:.{self._digits}f}")))
            return TaskResult(metrics, rows=[ResultTable("Modality gap", ("language", "distance"), rows)])
"""
CHOSEN = "evaluation=[retrieval,mine]"
METRIC = "val/emoji_heldout_families_zh/modality_gap"


@pytest.fixture(autouse=True)
def _task(own: Own) -> None:
    own.write("my_tasks.py", TASK)
    own.write("evaluation/mine.yaml", "gap: {_target_: my_tasks.ModalityGap, digits: 3}\n")


def call(command: Command, own: Own, *argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["m2", "--config-dir", str(own.folder), *argv])
        return command()


def test_a_task_takes_part_at_the_end_of_a_run_and_in_m2_evaluate(
    own: Own, m2_train: Train, emoji_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train(CHOSEN, "model.num_layers=1")
    said = capsys.readouterr().out
    metrics = json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]
    gap = metrics[METRIC]
    assert 0 < gap < 2
    assert METRIC.replace("modality_gap", "t2i_r@1") in metrics
    assert f"{gap:.3f}" in said[said.index("Modality gap") :]
    assert "retrieval.png" in said

    numbers = tmp_path / "numbers.json"
    line = (f"model={run / 'export'}", "splits=[heldout_families]", f"folder={emoji_folder}", f"output={numbers}")
    assert call(EVALUATE, own, *line, CHOSEN, "evaluation.gap.digits=5") == 0
    said = capsys.readouterr().out
    again = json.loads(numbers.read_text(encoding="utf-8"))["metrics"][METRIC]
    assert again == pytest.approx(gap, abs=1e-4)
    assert f"{again:.5f}" in said[said.index("Modality gap") :]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((CHOSEN, "evaluation.gap.digit=1"), "evaluation.gap.digit"),
        (("evaluation=[retrieval,main]",), "evaluation=main: no such option"),
        (("evaluation=[retrieval,rerank]",), "retrieval and rerank both define retrieval"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    own: Own, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: tuple[str, ...], message: str
) -> None:
    own.write("export/config.json", "{}")
    assert call(EVALUATE, own, f"model={own.folder / 'export'}", *line) == 2
    assert message in capsys.readouterr().err
    assert call(TRAIN, own, "+experiment=smoke", f"run.folder={tmp_path}", *line) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_group(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (EVALUATE, TRAIN):
        assert call(command, own, "--help") == 0
        groups = capsys.readouterr().out.replace("*", "")
        assert "masked | masked_picture | mine |" in " ".join(groups.split())
