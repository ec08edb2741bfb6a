"""What an experiment says of objectives that the command line left out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_encoder.cli import commands
from m2_encoder.config import validate
from m2_encoder.config.command import run_command
from m2_encoder.config.compose import Composition, open_composer
from m2_encoder.config.problems import format_problem
from m2_encoder.errors import UserError

CONF = Path(__file__).resolve().parents[3] / "conf"


def compose(folder: Path, *lines: str) -> Composition:
    with open_composer(folder, "train") as composer:
        return composer.compose([*lines, "logger=csv"])


@pytest.mark.parametrize("experiment", ["emoji_full", "r2d2", "sycoca", "coca", "siglip"])
def test_other_objectives_replace_those_of_an_experiment(experiment: str, tmp_path: Path) -> None:
    found = compose(CONF, f"+experiment={experiment}", "objective=[text_contrast,itc]", f"run.folder={tmp_path}")
    assert found.problems == []
    assert list(found.cfg["objective"]) == ["text_contrast", "itc"]
    assert validate.validate_train(found.cfg) == []


def test_what_stays_chosen_keeps_its_values(tmp_path: Path) -> None:
    found = compose(CONF, "+experiment=emoji_full", "objective=[cmlm,itc]", f"run.folder={tmp_path}")
    assert found.cfg["objective"]["cmlm"]["weight"] == 0.1
    assert set(found.cfg["objective"]) == {"cmlm", "itc"}


def test_the_command_sees_the_same(tmp_path: Path) -> None:
    """Hydra composes once more for the job itself."""
    seen: list[dict[str, Any]] = []
    command = dataclasses.replace(commands.TRAIN, run=seen.append)
    assert run_command(command, ["+experiment=emoji_full", "objective=[itc]", f"run.folder={tmp_path}"]) == 0
    assert list(seen[0]["objective"]) == ["itc"]


def test_values_on_the_command_line_must_be_of_chosen_ones() -> None:
    (problem,) = compose(CONF, "+experiment=emoji_full", "objective=[itc]", "objective.cmlm.weight=2").problems
    assert format_problem(problem).startswith("objective.cmlm.weight=2: the chosen objective has no cmlm")


@pytest.mark.parametrize("plus", ["+", "++"])
@pytest.mark.parametrize("value", ["cmlm.weight=2", "cmlm={weight: 2}"])
def test_a_plus_does_not_hide_it(plus: str, value: str) -> None:
    line = f"{plus}objective.{value}"
    (problem,) = compose(CONF, "objective=[itc]", line).problems
    assert (
        format_problem(problem) == f"{line}: the chosen objective has no cmlm, unlike objective=[...,cmlm]; choose it"
    )
    given = "objective.cmlm={_target_: m2_encoder.objectives.masked_language.MaskedLanguage}"
    assert compose(CONF, "objective=[itc]", f"{plus}{given}").problems == []


def test_what_is_shown_is_what_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = ["+experiment=emoji_full", "objective=[itc]", f"run.folder={tmp_path}", "--cfg", "job"]
    assert run_command(commands.TRAIN, lines) == 0
    assert list(yaml.safe_load(capsys.readouterr().out)["objective"]) == ["itc"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder with an objective, and an experiment that chooses it."""
    folder = tmp_path / "own"
    for name in ("objective", "experiment"):
        (folder / name).mkdir(parents=True)
    target = "m2_encoder.objectives.contrastive.ImageTextContrastive"
    (folder / "objective" / "mine.yaml").write_text(f"mine:\n  _target_: {target}\n  weight: 1.0\n", encoding="utf-8")
    (folder / "experiment" / "e.yaml").write_text(
        "# @package _global_\ndefaults: [override /objective: [itc, mine]]\nobjective: {mine: {weight: 0.3}}\n",
        encoding="utf-8",
    )
    return folder


def run_own(own: Path, *lines: str) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    command = dataclasses.replace(commands.TRAIN, run=seen.append)
    given = ["--config-dir", str(own), "+experiment=e", f"run.folder={own.parent / 'outputs'}", *lines]
    return seen if run_command(command, [*given, "logger=csv"]) == 0 else []


def test_objectives_of_an_own_folder_may_be_left_out(own: Path) -> None:
    assert [list(cfg["objective"]) for cfg in run_own(own, "objective=[itc]")] == [["itc"]]
    assert run_own(own)[0]["objective"]["mine"]["weight"] == 0.3


def test_own_folders_reach_other_ranks(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start with the arguments that the first one completed."""
    seen: list[list[str]] = []
    command = dataclasses.replace(commands.TRAIN, run=lambda _: seen.append(sys.argv[1:]))
    lines = ["--config-dir", str(own), "+experiment=e", "objective=[itc]", f"run.folder={own.parent / 'outputs'}"]
    assert run_command(command, lines) == 0
    assert run_command(command, list(seen[0])) == 0
    assert seen[0] == seen[1]


def test_own_folders_are_named_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f'hydra.searchpath=["file://{own}"]'
    assert run_own(own, line) == []
    assert capsys.readouterr().err == f"m2-train: {line}: --config-dir is given, too; name all folders in this one\n"


def test_conflicts_and_owners_in_an_own_folder(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "objective" / "twin.yaml").write_text("mine: {weight: 2}\n", encoding="utf-8")
    assert run_own(own, "objective=[mine,twin]") == []
    assert "mine and twin both define mine" in capsys.readouterr().err
    assert run_own(own, "objective=[itc]", "objective.mine.weight=2") == []
    assert "unlike objective=[...,mine] and objective=[...,twin]" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["mine: [1", "text", "- 1"])
def test_an_unreadable_file_that_is_not_chosen_matters_not(own: Path, text: str) -> None:
    (own / "objective" / "broken.yaml").write_text(text, encoding="utf-8")
    assert len(run_own(own, "objective=[itc]")) == 1


@pytest.mark.parametrize("lines", [["objective=[itc,flat]"], ["+experiment=f"]])
def test_an_option_without_its_name(own: Path, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "objective" / "flat.yaml"
    path.write_text((own / "objective" / "mine.yaml").read_text().replace("mine:\n", "").replace("  ", ""))
    (own / "experiment" / "f.yaml").write_text("# @package _global_\ndefaults: [override /objective: [flat]]\n")
    command = dataclasses.replace(commands.TRAIN, run=lambda _: None)
    assert run_command(command, ["--config-dir", str(own), *lines, f"run.folder={own.parent}"]) == 2
    expected = f"objective=[...,flat]: {path} must begin with `flat:`, with its values indented below"
    assert capsys.readouterr().err == f"m2-train: {expected}\n"


def test_an_entry_of_no_option_is_named(tmp_path: Path) -> None:
    found = compose(CONF, "+objective.cmml={weight: 0.5}", f"run.folder={tmp_path}")
    assert found.problems == []
    (problem,) = found.without_echoes(validate.validate_train(found.cfg))
    assert format_problem(problem).startswith(
        "objective.cmml={weight: 0.5}: must have a _target_; choose cmml in objective=[...]"
    )


@pytest.mark.parametrize("key", ["adaptation", "data", "optimizer", "scheduler", "trainer", "strategy"])
def test_what_has_no_target_is_named(tmp_path: Path, key: str) -> None:
    found = compose(CONF, f"~{key}._target_", f"run.folder={tmp_path}")
    (problem,) = map(format_problem, found.without_echoes(validate.validate_train(found.cfg)))
    assert problem.startswith(f"{key}._target_: is missing")


def test_null_is_no_validation(tmp_path: Path) -> None:
    lines = ["data=webdataset", "data.validation=null", f"data.sources.main.shards={tmp_path}/none.tar"]
    found = compose(CONF, *lines, "model.tokenizer=emoji", f"run.folder={tmp_path}")
    (problem,) = validate.validate_train(found.cfg)
    assert problem.key == "data.sources.main.shards"


def test_values_that_refer_to_each_other_are_all_named(tmp_path: Path) -> None:
    circle = ["optimizer.lr=${optimizer.eps}", "optimizer.eps=${optimizer.lr}", "seed=${seed}"]
    found = compose(CONF, *circle, f"run.folder={tmp_path}")
    keys = [problem.key for problem in found.without_echoes(found.problems)]
    assert sorted(keys) == ["optimizer.eps", "optimizer.lr", "seed"]


@pytest.mark.parametrize(
    ("lines", "softness"),
    [
        ([], [[0, 0.0], [500, 0.2]]),
        (["softness=0.3"], 0.3),
        (["softness=null", "softness=[[0,0.1]]"], [[0, 0.1]]),
    ],
)
def test_mappings_by_step_of_an_old_configuration(tmp_path: Path, lines: list[str], softness: object) -> None:
    (tmp_path / "config.yaml").write_text("softness: {0: 0.0, 500: 0.2}\n", encoding="utf-8")
    with open_composer(tmp_path, "config") as composer:
        found = composer.compose(lines)
    assert (found.problems, found.cfg) == ([], {"softness": softness})


def test_a_list_in_place_of_a_mapping_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("softness: {0: 0.0, 500: 0.2}\n", encoding="utf-8")
    with open_composer(tmp_path, "config") as composer, pytest.raises(UserError, match="or softness=null first"):
        composer.compose(["softness=[[0,0.1]]"])
