"""What people type before they have read the help: each command says what was meant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli import commands, data, train


@pytest.mark.parametrize(
    ("main", "line", "answers"),
    [
        (train.main, "m2-train smoke", ["smoke: has no value (did you mean +experiment=smoke?)"]),
        (train.main, "m2-train tiny", ["tiny: has no value (did you mean model=tiny?)"]),
        (train.main, "m2-train --experiment smoke", ["--experiment: unknown flag; options are written key=value"]),
        (train.main, "m2-train experiment=smoke", ["add it with +experiment=smoke"]),
        (
            train.main,
            "m2-train strategy.group_size=8",
            ["has no group_size, unlike strategy=grouped_ddp and strategy=grouped_fsdp; choose one of them"],
        ),
        (commands.EXPORT, "m2-export emoji", ["emoji: has no value", "run.name=???: must be given"]),
        (commands.EXPORT, "m2-export", ["run.name=???: must be given"]),
        (
            train.main,
            "m2-train model=m2_encoder_0_4b run.name=new",
            ["add model.tokenizer=FILE (the SentencePiece"],
        ),
        (
            commands.EMBED,
            "m2-embed model=runs/a images=pictures/cat.png output=x.safetensors",
            ["model=runs/a: is a run's folder; its model is in model=runs/a/export", "is a file; give the folder"],
        ),
        (data.main, "m2-data emojis", ["emojis: no such sub-command; choose from emoji"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answer(
    main: Callable[[], int],
    line: str,
    answers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs" / "a" / "export").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", line.split())
    assert main() == 2
    said = capsys.readouterr().err.strip().splitlines()
    problems = said if len(said) == 1 else said[1:]
    assert len(problems) == len(answers), said
    for problem, answer in zip(problems, answers, strict=True):
        assert answer in problem
