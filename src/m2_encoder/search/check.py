"""What is wrong with a search, before its first trial."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from m2_encoder.config.check import check_settings, make_settings
from m2_encoder.config.problems import refuse_all
from m2_encoder.config.sweeps import is_sweep_line, preset_lines
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.search.space import Dimension, read_space

_TRIES: Final = 12
_KEY: Final = "hydra.sweeper"


def check_search(
    lines: Sequence[str], hydra: DictConfig, find: Callable[[list[str]], Sequence[Problem]]
) -> list[Problem]:
    """Every value that no trial could use, or what else is wrong; nothing is written.

    Args:
        lines: the command line's overrides.
        hydra: Hydra's settings.
        find: what is wrong with one job, as overrides.

    Raises:
        UserError: if the space or the settings of the search cannot be used.
    """
    if importlib.util.find_spec("optuna") is None:
        rule = "needs Optuna; install it with pip install 'm2-encoder[search]'"
        return [Problem("hydra/sweeper", "search", rule)]
    if not str(hydra.launcher._target_).endswith(".BasicLauncher"):
        rule = "a search runs its trials one after the other on this machine"
        return [Problem("hydra/launcher", hydra.runtime.choices.get("hydra/launcher"), rule, "leave it out")]
    settings = read_settings(hydra)
    all_lines = [*preset_lines(hydra, lines), *lines]
    constant = [line for line in all_lines if not is_sweep_line(line)]
    if any(is_sweep_line(line) for line in all_lines):
        space = read_space(all_lines)
        from m2_encoder.search.study import rehearse

        rehearse(settings, space)
        return _find_useless(space, constant, find)
    found = list(find(constant))
    if not found:
        read_space(all_lines)
    return found


def read_settings(hydra: DictConfig) -> Any:
    """The settings of the search, `SearchSettings`.

    Raises:
        UserError: with all that is wrong with them.
    """
    from m2_encoder.search.study import SearchSettings

    node = OmegaConf.to_container(hydra.sweeper, resolve=True)
    assert isinstance(node, dict)
    given = {str(key): value for key, value in node.items() if key not in ("_target_", "_recursive_")}
    problems = check_settings(SearchSettings, given, _KEY)
    for name in ("sampler", "pruner"):
        value = given.get(name)
        if isinstance(value, Mapping) and "_target_" not in value:
            problems.append(Problem(f"{_KEY}.{name}._target_", NOTHING, "is missing", "name a class of Optuna's"))
    refuse_all(problems)
    return make_settings(SearchSettings, given)


def _find_useless(
    space: Sequence[Dimension], constant: Sequence[str], find: Callable[[list[str]], Sequence[Problem]]
) -> list[Problem]:
    """The problems of the first value that fails in every combination tried; one that works is enough."""
    fine: set[str] = set()
    for place, dimension in enumerate(space):
        others = [each.examples() for each in (*space[:place], *space[place + 1 :])]
        for line in dimension.examples():
            if line in fine:
                continue
            first: Sequence[Problem] = ()
            for rest in _combine(others):
                problems = find([*constant, *rest, line])
                if not problems:
                    fine |= {line, *rest}
                    break
                first = first or problems
            else:
                return list(first)
    return []


def _combine(others: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Some combinations: all first values, then others at random, or all where they are few."""
    yield [each[0] for each in others]
    total = 1
    for each in others:
        total *= len(each)
    if total <= _TRIES:
        yield from itertools.islice(itertools.product(*others), 1, None)
    else:
        generator = random.Random(0)
        for _ in range(_TRIES):
            yield [generator.choice(each) for each in others]
