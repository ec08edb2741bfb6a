"""Random combinations of all groups: each composes, or is refused by a rule with a way out, without a traceback."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.config.groups import CHOSEN_AS_LISTS
from m2_encoder.config.problems import format_problem
from m2_encoder.config.validate import check_late, validate_train
from m2_encoder.errors import MAX_LINE, Problem

_COMBINATIONS: Final = 40
_OF_ALL: Final = 0.35  # chance of a group to be chosen otherwise than by default
_OPTIONAL: Final = 0.25  # chance of a group that is not chosen by default


class Combination(NamedTuple):
    """One command line and what became of it."""

    lines: tuple[str, ...]
    problems: list[Problem]


@pytest.fixture(scope="module")
def composer(repo_root: Path) -> Iterator[Composer]:
    with open_composer(repo_root / "conf", "train") as found:
        yield found


def draw_lines(composer: Composer, dice: random.Random) -> list[str]:
    """Options of some groups; groups that are new join by themselves."""
    groups, chosen = composer.groups(), composer.chosen()
    lines = []
    for group, options in groups.items():
        if group in CHOSEN_AS_LISTS:
            if dice.random() < _OF_ALL:
                lines.append(f"{group}=[{','.join(dice.sample(options, dice.randint(0, min(4, len(options)))))}]")
        elif dice.random() < (_OF_ALL if group in chosen else _OPTIONAL):
            lines.append(f"{'' if group in chosen else '+'}{group}={dice.choice(options)}")
    return lines


def check(composer: Composer, lines: list[str], folder: Path) -> Combination:
    """As the command checks them, with values that the user alone can say: Hydra would compose twice for them."""
    found = composer.compose(lines)
    found.cfg["run"]["folder"] = str(folder)
    problems = [problem for problem in found.problems if problem.key != "model.tokenizer"]
    if len(problems) < len(found.problems):
        found.cfg["model"]["tokenizer"] = "emoji"
    if {"keep", "forgetting"} & {*(found.cfg.get("objective") or ()), *(found.cfg.get("evaluation") or ())}:
        found.cfg["model"]["weights"] = "https://localhost/weights.ckpt"
    problems += validate_train(found.cfg)
    if not problems:
        problems = check_late(found.cfg, changed=None)
    return Combination(tuple(lines), problems)


def test_forty_combinations(composer: Composer, tmp_path: Path) -> None:
    dice = random.Random(13)
    found = [check(composer, draw_lines(composer, dice), tmp_path) for _ in range(_COMBINATIONS)]
    for lines, problems in found:
        for problem in problems:
            said = format_problem(problem)
            assert len(said) <= MAX_LINE, lines
            assert problem.key, f"{lines}: {said} names no setting"
            assert problem.fix or ";" in problem.rule or "no such" in problem.rule, f"{lines}: {said} says no way out"
    accepted = sum(not problems for _, problems in found)
    assert accepted >= _COMBINATIONS // 20
    assert accepted < _COMBINATIONS


@pytest.mark.slow
def test_every_option_takes_part(composer: Composer, tmp_path: Path) -> None:
    """Each alone, beside the defaults; what lacks a value, such as a folder of data, says which."""
    chosen = composer.chosen()
    options = [(group, option) for group, names in composer.groups().items() for option in names]
    for group, option in options:
        value = f"[{option}]" if group in CHOSEN_AS_LISTS else option
        found = check(composer, [f"{'' if group in chosen else '+'}{group}={value}"], tmp_path)
        assert all(problem.key for problem in found.problems), f"{group}={option}"


_SMALL: Final = (
    "model.image_size=32", "model.num_layers=1", "model.embed_dim=32", "model.feature_dim=16", "model.num_heads=2",
    "trainer.accelerator=cpu", "trainer.max_steps=2", "scheduler.warmup_steps=1", "data.global_batch_size=8",
    "run.resume=auto", "logger=csv",
)  # fmt: skip
_TRAINED: Final = 20
_FIXED: Final = ("model", "data", "cluster", "experiment", "task", "logger", "strategy", "sweep", "debug", "profiler")
"""Groups whose options need files, ranks or an account, or stand for whole runs."""


@pytest.mark.slow
def test_twenty_combinations_train(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are accepted end well, or in one line that names a setting; none in a traceback."""
    dice, accepted = random.Random(7), []
    with open_composer(repo_root / "conf", "train") as composer:
        while len(accepted) < _TRAINED:
            lines = [line for line in draw_lines(composer, dice) if line.lstrip("+").partition("=")[0] not in _FIXED]
            if not check(composer, lines, tmp_path).problems:
                accepted.append(lines)
    for number, lines in enumerate(accepted):
        code = run_command(TRAIN, [*lines, *_SMALL, f"run.folder={tmp_path}", f"run.name=combination-{number}"])
        said = capsys.readouterr().err
        assert code in (0, 2), f"{lines}: {said}"
        assert "Traceback" not in said, f"{lines}: {said}"
