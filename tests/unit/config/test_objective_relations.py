"""Objectives of a configuration: what they read must be there, and one without a weight asks for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config import validate
from m2_encoder.config.compose import open_composer
from m2_encoder.config.overrides import quote_unreadable
from m2_encoder.config.problems import format_problem

Problems = Callable[..., list[str]]


@pytest.fixture(scope="module")
def problems(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Problems:
    outputs = tmp_path_factory.mktemp("outputs")

    def find(*lines: str) -> list[str]:
        given = [quote_unreadable(line) for line in (f"run.folder={outputs}", *lines)]
        with open_composer(repo_root / "conf", TRAIN.config_name) as composer:
            composition = composer.compose([*given, "logger=csv", "trainer.accelerator=cpu"])
        found = [*composition.problems, *validate.validate_train(composition.cfg)]
        return [format_problem(problem) for problem in composition.without_echoes(found)]

    return find


@pytest.mark.parametrize(
    "lines",
    [
        ("objective=[itc,text_contrast]", "data.captions.every_language=false", "objective.text_contrast.weight=0"),
        ("objective=[itc,cmlm,captioning]", "objective.cmlm.text_expert=true", "objective.captioning.weight=0"),
        ("objective=[itc,cmim_codes]", "objective.cmim.targets.tokenizer=/no/folder", "objective.cmim.weight=0"),
        (
            "objective=[itc,distillation]",
            "objective.distillation.teacher=/no/folder",
            "objective.distillation.weight=0",
        ),
        ("objective=[itc,cmlm]", "objective.cmlm.user_dictionary=/no/file", "objective.cmlm.weight=0"),
    ],
)
def test_only_what_counts_asks_for_something(problems: Problems, lines: tuple[str, ...]) -> None:
    assert len(problems(*lines[:2])) == 1
    assert problems(*lines) == []


def test_teachers_must_be_there(problems: Problems, tmp_path: Path) -> None:
    key = "objective.distillation.teacher"

    def find(*lines: str) -> str:
        (problem,) = problems("objective=[itc,distillation]", *lines)
        return problem

    assert find() == f"{key}=???: must be given; add {key}=FOLDER (of m2-export)"
    assert find(f"{key}=/no/folder") == f"{key}=/no/folder: no folder with an exported model; give one of m2-export"
    (tmp_path / "export").mkdir()
    assert find(f"{key}={tmp_path}").endswith(f"; use {key}={tmp_path}/export")
    assert f"add {key}_weights=FILE" in find(f"{key}=m2-encoder-1b")
    assert find(f"{key}=m2-encoder-1b", f"{key}_weights=/no/file").startswith(f"{key}_weights=/no/file: no such file;")
    (tmp_path / "export" / "config.json").touch()
    assert problems("objective=[itc,distillation]", f"{key}={tmp_path}/export") == []


def test_dictionaries_are_read_before_a_run_starts(problems: Problems, tmp_path: Path) -> None:
    key = "objective.cmlm.user_dictionary"
    words = tmp_path / "我的 words=1.txt"
    (problem,) = problems("objective=[cmlm]", f"{key}={words}")
    assert problem.startswith(f"{key}={words}: No such file or directory; give a UTF-8 file")
    words.write_bytes("表情符号".encode("gb18030"))
    (problem,) = problems("objective=[cmlm]", f"{key}={words}")
    assert "is not UTF-8" in problem
    words.write_text("表情符号\n笑脸 -5 n\n", encoding="utf-8")
    (problem,) = problems("objective=[cmlm]", f"{key}={words}")
    assert problem.startswith(f"{key}={words}: line 2: ")
    assert "笑脸 -5" in problem
    words.write_text("\n", encoding="utf-8")
    (problem,) = problems("objective=[cmlm]", f"{key}={words}")
    assert "holds no words" in problem
    words.write_text("表情符号 100 n\n", encoding="utf-8")
    assert problems("objective=[cmlm]", f"{key}={words}") == []
    (problem,) = problems("objective=[cmlm]", f"{key}={tmp_path}")
    assert "is no regular file (a folder, a pipe or a device)" in problem


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        (("objective=[itc,cmim,cmim_codes]",), "cmim and cmim_codes both define cmim"),
        (("objective=[itc,cmlm,itc]",), "itc is there twice"),
        (("objective=[itc,cmim_codes]", "objective.cmim.targets.tokenizer=/no/folder"), "no such folder"),
    ],
)
def test_what_is_chosen_together_must_add_something(problems: Problems, lines: tuple[str, ...], rule: str) -> None:
    (problem,) = problems(*lines)
    assert rule in problem


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("torch.nn.Identity", "is no objective; name a subclass of m2_encoder.objectives.base.Objective"),
        ("m2_encoder.objectives.base.LocalObjective", "does not define terms"),
    ],
)
def test_classes_that_are_no_objectives(problems: Problems, target: str, rule: str) -> None:
    (problem,) = problems(f"+objective.mine={{_target_: {target}}}")
    assert problem.startswith(f"objective.mine._target_={target}: ")
    assert rule in problem


@pytest.mark.parametrize("value", ["null", "[1]", "3"])
def test_what_is_no_mapping_is_one_mistake_among_others(problems: Problems, value: str) -> None:
    problem, other = sorted(problems(f"+objective.mine={value}", "seed=-1"))
    assert problem.startswith(f"objective.mine={value}: ")
    assert other.startswith("seed=-1: ")


@pytest.mark.parametrize("value", ["[[0, 1], [0, 0]]", "[[1, -1]]", "[]", "3", "[0, 1]"])
def test_a_schedule_without_points_is_one_mistake_among_others(problems: Problems, value: str) -> None:
    problem, other = sorted(problems(f"objective.itc.schedule={value}", "seed=-1"))
    assert problem.startswith(f"objective.itc.schedule={value}: must be pairs of a step and a number")
    assert other.startswith("seed=-1: ")


def test_a_missing_visual_tokenizer_is_no_sentencepiece_model(problems: Problems) -> None:
    (problem,) = problems("objective=[itc,cmim_codes]")
    assert "outputs/visual_tokenizer/export" in problem


def test_what_is_predicted_of_patches_must_be_said(problems: Problems) -> None:
    (problem,) = problems("objective=[itc,cmim_codes]", "objective.cmim.targets=null")
    assert problem.startswith("objective.cmim.targets=null: must be keys with a _target_ (pixels: objective=[cmim])")


@pytest.mark.parametrize("name", ["forward", "training", "keys", "total"])
def test_names_that_mean_something_else(problems: Problems, name: str) -> None:
    target = "m2_encoder.objectives.contrastive.ImageTextContrastive"
    (problem,) = problems(f"+objective.{name}={{_target_: {target}, weight: 1.0}}")
    assert problem.startswith(f"objective.{name}: an objective cannot have this name, which means something else; ")


def test_what_is_forgotten_needs_a_start(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").touch()
    chosen = ("evaluation=[retrieval,forgetting]",)
    assert problems(*chosen) == [
        "evaluation.forgetting: compares with what a run starts from, model.weights; add model.weights=FOLDER of "
        "m2-export or FILE, or leave it out of evaluation"
    ]
    assert problems(*chosen, f"model.weights={tmp_path / 'weights.ckpt'}") == []
