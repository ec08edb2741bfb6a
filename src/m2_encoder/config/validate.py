"""Validation of `m2-train`'s configuration, all problems at once, before anything heavy starts.

`python -m m2_encoder.config.validate` composes and validates every shipped experiment; it reads no data.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from m2_encoder.config.check import check_targets
from m2_encoder.config.compose import open_composer
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import format_problem
from m2_encoder.config.relations import check_relations
from m2_encoder.config.schema import check_shape
from m2_encoder.errors import Problem, UserError

GIVEN_ARGUMENTS: Final[Mapping[str, Sequence[str]]] = {
    "data": ("tokenizer", "image_size", "seed", "max_steps"),
    "data.decode": ("data",),
    "data.transform": ("image_size",),
    "task": ("image_size", "patch_size", "optimizer", "scheduler", "validation_name"),
    "optimizer": ("module",),
    "scheduler": ("optimizer",),
    "trainer": ("strategy", "logger", "callbacks", "plugins", "default_root_dir"),
    "logger": ("run_name", "folder", "cfg"),
    "callbacks.checkpoint": ("folder",),
}
"""By node, what the command passes itself when it builds the object."""


_NEED_LIGHTNING: Final = ("data", "trainer", "strategy", "callbacks", "task")
"""Groups whose classes Lightning's own are the parents of."""


def validate_train(
    cfg: dict[str, Any], *, on_this_machine: bool = True, changed: Collection[str] | None = None
) -> list[Problem]:
    """Everything that is wrong with a composed configuration of `m2-train`.

    Args:
        cfg: plain containers, as `config.compose` makes them.
        on_this_machine: also ask whether this machine has what the run needs.
        changed: groups that are not as they were shipped; None if nobody knows. Once something is wrong, Lightning,
            which takes seconds to import, is asked about these alone.

    Returns:
        One per mistake; empty when training can start.
    """
    problems = check_shape(cfg)
    problems += check_targets(
        {key: value for key, value in cfg.items() if key not in _NEED_LIGHTNING}, given=GIVEN_ARGUMENTS
    )
    for group in _NEED_LIGHTNING:
        if group in cfg and (not problems or changed is None or group in changed):
            problems += check_targets(cfg[group], given=GIVEN_ARGUMENTS, path=group)
    reported: dict[str, Problem] = {}
    for problem in problems:
        reported.setdefault(problem.key, problem)
    found = check_relations(cfg, set(reported), on_this_machine=on_this_machine)
    return [*reported.values(), *found]


def validate_experiments() -> dict[str, list[str]]:
    """Composes and validates every shipped experiment.

    Returns:
        Problems by experiment; the defaults are the experiment "".
    """
    found: dict[str, list[str]] = {}
    with open_composer(find_conf(), "train") as composer:
        for name in ("", *composer.groups().get("experiment", [])):
            # A run of that name may lie in outputs; that says nothing about the configuration.
            lines = ["run.resume=auto", *([f"+experiment={name}"] if name else [])]
            composition = composer.compose(lines)
            if any(problem.startswith("model.tokenizer=???") for problem in composition.problems):
                composition = composer.compose([*lines, "model.tokenizer=emoji"])  # which file, the user alone can say
            problems = validate_train(composition.cfg, on_this_machine=False)
            found[name] = composition.without_echoes([*composition.problems, *map(format_problem, problems)])
    return found


def main() -> int:
    """Prints what is wrong with the shipped experiments; exit code 2 if anything is."""
    try:
        found = validate_experiments()
    except UserError as error:
        found = {"": [str(error)]}
    for name, problems in found.items():
        title = f"+experiment={name}" if name else "defaults"
        print(f"{title}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
    return 2 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
