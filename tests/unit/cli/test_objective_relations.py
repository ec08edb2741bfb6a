"""Objectives of a configuration: what they read must be there, and one without a weight asks for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m2_encoder.cli import validate
from m2_encoder.cli.compose import open_composer
from m2_encoder.cli.path_values import protect_paths
from m2_encoder.cli.train import _PATH_KEYS, COMMAND

Problems = Callable[..., list[str]]


@pytest.fixture(scope="module")
def problems(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Problems]:
    outputs = tmp_path_factory.mktemp("outputs")
    with open_composer(repo_root / "conf", COMMAND.config_name) as composer:

        def find(*lines: str) -> list[str]:
            given = protect_paths(lines, _PATH_KEYS)
            composition = composer.compose([*given, "logger=csv", f"run.folder={outputs}", "trainer.accelerator=cpu"])
            found = [*composition.problems, *validate.validate_train(composition.cfg)]
            return composition.without_echoes(found)

        yield find


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
    words.write_text("表情符号 100 n\n", encoding="utf-8")
    assert problems("objective=[cmlm]", f"{key}={words}") == []
    (problem,) = problems("objective=[cmlm]", f"{key}={tmp_path}")
    assert "Is a directory" in problem


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


def test_a_missing_visual_tokenizer_is_no_sentencepiece_model(problems: Problems) -> None:
    (problem,) = problems("objective=[itc,cmim_codes]")
    assert "outputs/visual_tokenizer/export" in problem
