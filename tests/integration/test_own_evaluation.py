"""An evaluation task of the user's own: a class and a YAML file outside of the package, and no change inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli.commands import EVALUATE, TRAIN
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

MODULE = '''
from m2_encoder.evaluation.tables import ResultRow, ResultTable
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult


class ModalityGap(EvaluationTask):
    """Distance between the mean of the images and the mean of the texts, which are all of length 1."""

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
'''
YAML = """
gap:
  _target_: own_tasks.ModalityGap
  digits: 3
"""
CHOSEN = "evaluation=[retrieval,mine]"


def call(main: Callable[[], int], *argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["m2", *argv])
        return main()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Path:
    """A folder for `--config-dir`; the module beside it can be imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_tasks.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "conf" / "evaluation").mkdir(parents=True)
    (tmp_path / "conf" / "evaluation" / "mine.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)
    monkeypatch.chdir(repo_root)
    return tmp_path / "conf"


def test_a_task_takes_part_at_the_end_of_a_run_and_in_m2_evaluate(
    own: Path, emoji_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("trainer.max_steps=2", "trainer.val_check_interval=2", "scheduler.warmup_steps=1", "model.num_layers=1")
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}", "--config-dir", str(own))
    assert call(TRAIN, "+experiment=smoke", *few, *places, CHOSEN) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text(encoding="utf-8"))
    gap = summary["metrics"]["val/emoji_heldout_families_zh/modality_gap"]
    assert 0 < gap < 2
    assert "val/emoji_heldout_families_zh/t2i_r@1" in summary["metrics"]
    assert f"{gap:.3f}" in said[said.index("Modality gap") :]
    assert "retrieval.png" in said

    numbers = tmp_path / "numbers.json"
    line = (f"model={tmp_path / 'smoke' / 'export'}", "splits=[heldout_families]", f"folder={emoji_folder}")
    own_values = ("--config-dir", str(own), CHOSEN, "evaluation.gap.digits=5", f"output={numbers}")
    assert call(EVALUATE, *line, *own_values) == 0
    said = capsys.readouterr().out
    metrics = json.loads(numbers.read_text(encoding="utf-8"))["metrics"]
    assert metrics["val/emoji_heldout_families_zh/modality_gap"] == pytest.approx(gap, abs=1e-4)
    assert f"{metrics['val/emoji_heldout_families_zh/modality_gap']:.5f}" in said[said.index("Modality gap") :]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((CHOSEN, "evaluation.gap.digit=1"), "evaluation.gap.digit"),
        (("evaluation=[retrieval,main]",), "evaluation=main: no such option"),
        (("evaluation=[retrieval,rerank]",), "retrieval and rerank both define retrieval"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: tuple[str, ...], message: str
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}", encoding="utf-8")
    shared = ("--config-dir", str(own), *line)
    assert call(EVALUATE, f"model={tmp_path / 'export'}", *shared) == 2
    assert message in capsys.readouterr().err
    assert call(TRAIN, "+experiment=smoke", f"run.folder={tmp_path}", *shared) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_group(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (EVALUATE, TRAIN):
        assert call(main, "--help", "--config-dir", str(own)) == 0
        assert "masked | masked_picture | mine |" in capsys.readouterr().out.replace("*", "")
