"""What an objective refuses when it is made is said with everything else that is wrong, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m2_encoder.config import validate
from m2_encoder.config.compose import open_composer
from m2_encoder.config.problems import format_problem

Problems = Callable[..., list[str]]
OWN = "tests.support.own_objectives"


@pytest.fixture(scope="module")
def problems(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Problems:
    outputs = tmp_path_factory.mktemp("outputs")

    def find(*lines: str) -> list[str]:
        with open_composer(repo_root / "conf", "train") as composer:
            composition = composer.compose(
                ["+experiment=smoke", f"run.folder={outputs}", *lines, "logger=csv", "trainer.accelerator=cpu"]
            )
        found = [*composition.problems, *validate.validate_train(composition.cfg)]
        return [format_problem(problem) for problem in composition.without_echoes(found)]

    return find


@pytest.mark.parametrize("masking", ["block", "attentive"])
@pytest.mark.parametrize(("ratio", "count", "fix"), [(0.001, 0, "0.0625"), (0.99, 16, "0.9375")])
def test_a_ratio_that_hides_no_patch_or_all(
    problems: Problems, masking: str, ratio: float, count: int, fix: str
) -> None:
    chosen = ("objective=[itc,cmim]", f"objective.cmim.masking={masking}", f"objective.cmim.mask_ratio={ratio}")
    assert problems(*chosen) == [
        f"objective.cmim.mask_ratio={ratio}: hides {count} of the 16 patches, and must hide at least one and not all; "
        f"for example {fix}"
    ]
    assert problems(*chosen, "objective.cmim.weight=0") == []


def test_the_ratio_of_codes_is_looked_at_without_their_tokenizer(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    chosen = ("objective=[itc,cmim_codes]", f"objective.cmim.targets.tokenizer={tmp_path}")
    assert problems(*chosen) == []
    (problem,) = problems(*chosen, "objective.cmim.mask_ratio=0.001")
    assert problem.startswith("objective.cmim.mask_ratio=0.001: hides 0 of the 16 patches")


def test_an_objective_of_ones_own_is_built_once_in_vain(problems: Problems) -> None:
    def of(name: str, more: str = "") -> list[str]:
        return problems(f"+objective.mine={{_target_: {OWN}.{name}, weight: 1.0{more}}}")

    assert of("WideOnly") == ["objective.mine: embed_dim=64 is too narrow; use 1000 or more"]
    assert of("Picky", ", margin: -1") == ["objective.mine.margin=-1: must be 0 or more"]
    assert problems(f"+objective.mine={{_target_: {OWN}.make_nothing}}") == [
        f"objective.mine._target_={OWN}.make_nothing: makes no objective; "
        "name a subclass of m2_encoder.objectives.base.Objective"
    ]
    with pytest.raises(AttributeError, match="width"):  # a fault of the code, which a traceback shows best
        of("Broken")


def test_a_build_in_vain_changes_nothing(problems: Problems) -> None:
    state = torch.get_rng_state()
    assert problems(f"+objective.mine={{_target_: {OWN}.LooksInside, weight: 1.0}}") == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("target", ["os.getcwd", "torch.nn.Identity"])
def test_targets_must_be_targets_of_patches(problems: Problems, target: str) -> None:
    assert problems("objective=[itc,cmim]", f"objective.cmim.targets._target_={target}") == [
        f"objective.cmim.targets._target_={target}: makes no targets of patches; "
        "name a subclass of m2_encoder.objectives.patch_targets.PatchTargets"
    ]


def test_one_mistake_takes_one_line(problems: Problems) -> None:
    assert len(problems("objective=[itc,cmim]", "objective.cmim.mask_ratio=2")) == 1
    assert len(problems("objective=[itc,cmim]", "objective.cmim.mask_ratio=0.001", "model.image_size=65")) == 1
