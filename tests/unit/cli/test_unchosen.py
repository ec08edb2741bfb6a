"""What an experiment says of objectives that the command line left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.cli import train, validate
from m2_encoder.cli.compose import Composition, open_composer
from m2_encoder.cli.main import run_command

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
    command = dataclasses.replace(train.COMMAND, run=seen.append)
    assert run_command(command, ["+experiment=emoji_full", "objective=[itc]", f"run.folder={tmp_path}"]) == 0
    assert list(seen[0]["objective"]) == ["itc"]


def test_values_on_the_command_line_must_be_of_chosen_ones() -> None:
    (problem,) = compose(CONF, "+experiment=emoji_full", "objective=[itc]", "objective.cmlm.weight=2").problems
    assert problem.startswith("objective.cmlm.weight=2: the chosen objective has no cmlm")


def test_an_entry_of_no_option_is_named(tmp_path: Path) -> None:
    found = compose(CONF, "+objective.cmml={weight: 0.5}", f"run.folder={tmp_path}")
    assert found.problems == []
    (problem,) = validate.validate_train(found.cfg)
    assert problem.startswith("objective.cmml={weight: 0.5}: must have a _target_; choose cmml in objective=[...]")
