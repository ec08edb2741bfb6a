"""Choices of options and keys that cannot be: one line each, with what to write in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config import validate
from m2_encoder.config.command import run_command
from m2_encoder.config.compose import open_composer
from m2_encoder.config.problems import format_problem
from m2_encoder.runs.folder import write_config

CONF = Path(__file__).resolve().parents[3] / "conf"
SOFTNESS = "objective.soft_targets.softness"


def _problems(*lines: str, folder: Path = CONF, name: str = "train") -> list[str]:
    with open_composer(folder, name) as composer:
        return [format_problem(problem) for problem in composer.compose(lines).problems]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["model=null"], "model=null: a group cannot be null; choose from m2_encoder_0_4b, "),
        (["objective=null"], "objective=null: a group cannot be null; choose from captioning, "),
        (["objective=[null]"], "objective=null: no such option; choose from captioning, "),
        (["task=null"], "task=null: task is not chosen by default; leave this out"),
        (["+task=null"], "+task=null: a group cannot be null; choose from visual_tokenizer"),
        (["~task"], "~task: task is not chosen by default; leave this out"),
        (["hydra/launcher=null"], "hydra/launcher=null: a group cannot be null; choose from basic"),
    ],
)
def test_no_option(lines: list[str], expected: str) -> None:
    (problem,) = _problems(*lines)
    assert problem.startswith(expected)


def test_a_value_that_is_missing_may_be_given_in_a_mapping() -> None:
    assert _problems("objective=[itc,cmim_codes]", "objective.cmim.targets={tokenizer: here}") == []


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("objective=[itc],[itc,cmlm]", False),
        (f"{SOFTNESS}=[[0,0.1]],[[0,0.5]]", False),
        ("optimizer.betas=0.9,0.98", True),
    ],
)
def test_several_values_without_a_sweep(line: str, hint: bool) -> None:
    (problem,) = _problems("+experiment=r2d2", line)
    assert ("for a list write" in problem) == hint
    assert problem.endswith("to run them all add --multirun")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("objective=[itc]", "leave others out with ~objective.cmlm"),
        ("objective=[itc,cmlm]", "leave it out"),
        ("objective=[itc,itm]", "has no options such as itm; compose from conf/ for them"),
    ],
)
def test_a_saved_configuration_has_keys_in_place_of_choices(tmp_path: Path, line: str, fix: str) -> None:
    with open_composer(CONF, "train") as composer:
        cfg = composer.compose(["objective=[itc,cmlm]", f"run.folder={tmp_path}"]).cfg
    write_config(tmp_path / "config.yaml", cfg)
    (problem,) = _problems(line, folder=tmp_path, name="config")
    assert problem.startswith(f"{line}: objective holds itc, cmlm here")
    assert problem.endswith(fix)
    assert _problems("~objective.cmlm", folder=tmp_path, name="config") == []


@pytest.mark.parametrize("lines", [["objective=[]"], ["~objective.itc"], ["+experiment=emoji_full", "objective=[]"]])
def test_nothing_to_train_is_said_early(lines: list[str]) -> None:
    with open_composer(CONF, "train") as composer:
        composition = composer.compose([*lines, "logger=csv", "trainer.accelerator=cpu"])
    assert composition.problems == []
    problems = [each for each in validate.validate_train(composition.cfg) if each.key.startswith("objective")]
    assert [*map(format_problem, problems)] == ["objective: is missing; name at least one, for example objective=[itc]"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "seed=interval(0,1)",
            "seed=interval(0,1): a sweep runs every value, and an interval names none; use ",
        ),
        ("+experiment=glob(nothing*)", "+experiment=glob(nothing*): "),
    ],
)
def test_sweeps_that_name_no_jobs(
    line: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert run_command(TRAIN, ["-m", line, f"run.folder={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"m2-train: {rule}")


def test_sweeps_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert run_command(TRAIN, ["seed=1,2", "--cfg", "job"]) == 2
    assert capsys.readouterr().err.startswith("m2-train: seed=1,2: holds several values")
