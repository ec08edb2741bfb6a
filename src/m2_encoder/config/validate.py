"""Validation of `m2-train`'s configuration, all problems at once, before anything heavy starts.

`python -m m2_encoder.config.validate` composes and validates every shipped experiment; it reads no data.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from m2_encoder.config.check import check_targets, read_parameters
from m2_encoder.config.compose import open_composer
from m2_encoder.config.foreign_model import check_model
from m2_encoder.config.loggers import fill_folders, given_to_loggers
from m2_encoder.config.metric_names import check_metric
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import format_problem
from m2_encoder.config.relations import check_relations
from m2_encoder.config.schema import Trainer, check_shape
from m2_encoder.errors import Problem, UserError
from m2_encoder.objectives.files import START

GIVEN_ARGUMENTS: Final[Mapping[str, Sequence[str]]] = {
    "data": ("tokenizer", "image_size", "seed", "max_steps", "pictures"),
    "data.decode": ("data", "pictures"),
    "data.transform": ("image_size", "pictures"),
    "task": ("image_size", "patch_size", "tokenizer", "optimizer", "scheduler", "validation_name"),
    "optimizer": ("module", "params", "model", "model_or_params"),
    "scheduler": ("optimizer",),
    "trainer": ("strategy", "logger", "callbacks", "plugins", "default_root_dir"),
    "callbacks.checkpoint": ("folder", "keep_last", "keep_every"),
    "profiler": ("dirpath",),
}
"""By node, what the command passes itself when it builds the object; `given_to_loggers` has the rest."""

_NODES_OF_LIGHTNING: Final = ("callbacks", "data", "evaluation", "logger", "profiler", "strategy", "task", "trainer")


def validate_train(
    cfg: dict[str, Any], *, changed: Collection[str] | None = None, on_this_machine: bool = True
) -> list[Problem]:
    """Everything that is wrong with a composed configuration of `m2-train`.

    Args:
        cfg: plain containers, as `config.compose` makes them.
        changed: keys with other values than shipped files; the rest is left to `check_late`. None to check everything.
        on_this_machine: also ask whether this machine has what the run needs.
    """
    trusted = _find_trusted(changed)
    compared = {key: node for key, node in _as_built(cfg).items() if key not in trusted and key != "model"}
    found: dict[str, Problem] = {}
    for problem in (*check_shape(cfg), *check_model(cfg.get("model")), *_check_targets(compared)):
        found.setdefault(problem.key, problem)
    relations = check_relations(cfg, set(found), on_this_machine=on_this_machine)
    return [*found.values(), *relations, *check_metric(cfg)]


def _as_built(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """What objects are made of: without `trainer.compile`, which is the module's; with an end of the schedule.

    Where that is the end of the run, the data will say later how long an epoch is.
    """
    trainer, scheduler = cfg.get("trainer"), cfg.get("scheduler")
    if not isinstance(trainer, Mapping):
        return cfg
    if isinstance(scheduler, Mapping) and trainer.get("max_steps") == scheduler.get("max_steps") == -1:
        scheduler = {**scheduler, "max_steps": 1}
    built = {key: value for key, value in trainer.items() if key != "compile"}
    return {**cfg, "trainer": built, **({} if scheduler is None else {"scheduler": scheduler})}


def check_late(cfg: Mapping[str, Any], *, changed: Collection[str] | None) -> list[Problem]:
    """What is wrong with nodes that `validate_train` trusted."""
    trusted = _find_trusted(changed)
    return list(_check_targets({key: node for key, node in _as_built(cfg).items() if key in trusted}))


def _check_targets(cfg: dict[str, Any]) -> Iterator[Problem]:
    loggers = cfg.get("logger")
    filled = {"logger": fill_folders(loggers, "outputs")} if isinstance(loggers, Mapping) else {}
    return check_targets({**cfg, **filled}, given={**_given(cfg), **given_to_loggers(loggers)})


def _given(cfg: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """`GIVEN_ARGUMENTS`, but what other people's tasks and data are given by their own files is theirs."""
    given = dict(GIVEN_ARGUMENTS)
    for key in ("task", "data"):
        node = cfg.get(key)
        if isinstance(node, Mapping) and not str(node.get("_target_")).startswith("m2_encoder."):
            given[key] = [name for name in given[key] if name not in node]
    return given


def _find_trusted(changed: Collection[str] | None) -> set[str]:
    """Nodes whose targets need Lightning, and whose values are as shipped or bounded by `schema.Trainer`."""
    if changed is None:
        return set()
    bounded = {f"trainer.{name}" for name in read_parameters(Trainer)}
    return set(_NODES_OF_LIGHTNING) - {key.partition(".")[0] for key in changed if key not in bounded}


_OF_USERS: Final = {
    "model.tokenizer": "emoji",
    "model.weights": "https://localhost/weights.ckpt",
    "data.sources.main.shards": "tars",
    "data.validation.mine": "tars",
    "model.image.model": START,  # no other teacher is there
    "model.image_size": "32",
    "model.text.folder": "sentences",
}
"""Values that an experiment leaves to the user alone, and what stands for them where experiments are checked."""


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
            missing = {problem.key for problem in composition.problems} & _OF_USERS.keys()
            if "forgetting" in (composition.cfg.get("evaluation") or {}) or "model.image.model" in missing:
                missing.add("model.weights")
            if missing:
                composition = composer.compose([*lines, *(f"{key}={_OF_USERS[key]}" for key in sorted(missing))])
            problems = validate_train(composition.cfg, on_this_machine=False)
            found[name] = [
                format_problem(each) for each in composition.without_echoes([*composition.problems, *problems])
            ]
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
