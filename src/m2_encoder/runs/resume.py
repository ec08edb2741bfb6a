"""What a run that goes on must find as it was, and what a command line changes about it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import lightning
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from m2_encoder.checkpoints.training_state import read_content
from m2_encoder.checkpoints.vocabulary import CHECKPOINT_KEY, check_stored
from m2_encoder.config.model_choice import build_tokenizer, model_shape
from m2_encoder.config.problems import show
from m2_encoder.config.targets import find_target
from m2_encoder.config.trusted import find_targets, refuse_foreign
from m2_encoder.errors import Problem, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.trainable_parts import PARTS
from m2_encoder.models.two_towers import Encoder
from m2_encoder.models.visual_tokenizer import VisualTokenizerConfig
from m2_encoder.objectives.base import Objective, active
from m2_encoder.runs.folder import CONFIG_FILE, UNSAID, fill_in, read_config, read_run
from m2_encoder.training.module import PretrainModule

_FREE: Final = (
    "run",
    "logger",
    "cluster",
    "evaluation",
    "profiler",
    "trainer.profiler",
    "trainer.max_time",
    "trainer.enable_progress_bar",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "data.folder",
    "data.num_workers",
    "data.cache",
    "data.stall_timeout_s",
    "data.new_segment",
)
"""Settings that change neither what is trained nor on what."""

_FREE_OF_OBJECTIVES: Final = ("weight", "schedule")
"""Settings of an objective that decide on no parameter."""

_REPORTING: Final = (*_FREE, "data.validation", "callbacks")
"""What may differ where all steps are done, and only the evaluation and the export are made again."""

_STARTS: Final = ("weights", "map_tokenizer", "stretch_positions")
_INITIAL: Final = (*(f"model.{key}" for key in _STARTS), "model.position_init_std", "model.initial_temperature")
"""Settings that decide on values which the checkpoint holds: a run that goes on never reads them."""

_EXACT_SCHEDULES: Final = ("m2_encoder.training.optim.warmup_cosine", "m2_encoder.training.optim.warmup_constant")
"""Schedules without a state but the step: with other settings, the next step has the learning rate of these."""

_HYDRA_KEYS: Final = ("_target_", "_partial_", "_convert_", "_recursive_")

_PACKAGE: Final = "m2_encoder."
_TOKENIZER_TASK: Final = "m2_encoder.training.visual_tokenizer_module.VisualTokenizerModule"
_AS_BEFORE: Final = "as in the run that is continued"
_ONLY_LOOKS: Final = ("callbacks", "logger", "evaluation")
_NEW_NAME: Final = "give another run.name"
_LOAD_ERROR: Final = "Error(s) in loading state_dict"

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def describe_changes(path: Path, cfg: Mapping[str, Any]) -> list[str]:
    """Settings that differ from those a run was started with last, as "KEY: OLD then, NEW now".

    The order of samples is refused if it changes, the model's shape, and what would change nothing (`check_resume`);
    all other changes are the user's right, but not to be made unseen: after one of captions or augmentation a resumed
    run is no longer the uninterrupted one.

    `path` is `config.yaml` of the run; where there is none, nothing is known to have changed.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return []
    changes = _compare("", fill_in(UNSAID | read_config(path)), fill_in(UNSAID | dict(cfg)))
    return [f"{key}: {before!r} then, {now!r} now" for key, before, now in changes]


def _compare(key: str, before: Any, now: Any, free: Sequence[str] = _FREE) -> Iterator[tuple[str, Any, Any]]:
    if key in free or before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*now, *before)):
            yield from _compare(f"{key}.{name}".lstrip("."), before.get(name), now.get(name), free)
    else:
        yield key, before, now


def check_resume(
    module: lightning.LightningModule,
    cfg: Mapping[str, Any],
    folder: Path,
    checkpoint: Path,
    *,
    is_over: bool | None = None,
) -> None:
    """Refuse a checkpoint that does not fit what is to be trained, before anything is written or started.

    Settings that would change nothing are refused, too. The module is not built yet, and left so. `config.yaml` in the
    run's folder says how the run began. `is_over`: whether no step is left; by default if all are done.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        UserError: naming all settings that may not differ, or else the first parameter that does.
    """
    before = read_run(folder / CONFIG_FILE, needed=("model",)) if (folder / CONFIG_FILE).is_file() else {}
    if problems := list(_check_sizes(before, cfg)):
        raise UserError("the run that is continued does not fit", problems=problems)
    content = read_content(checkpoint)
    if isinstance(entry := content.get(CHECKPOINT_KEY), Mapping):
        tokenizer = build_tokenizer(cfg["model"], model_shape(cfg["model"]))
        try:
            check_stored(str(entry.get("sha256")), tokenizer, weights=checkpoint)
        except UserError as error:
            raise UserError(str(error), key="model.tokenizer", value=cfg["model"]["tokenizer"]) from error
    done = content["global_step"]
    is_over = done >= cfg["trainer"]["max_steps"] if is_over is None else is_over
    if problems := list(_find_idle(before, cfg, checkpoint, done=done, is_over=is_over)):
        raise UserError("the run that is continued would not follow these settings", problems=problems)
    if (found := _find_misfit(module, content)) is not None:
        name, said = found
        raise UserError(f"its checkpoint does not fit: {said}", problems=[_explain(name, said, before, cfg)])
    _refuse_strangers(before, cfg)


def _refuse_strangers(before: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Nothing of `before` is built; but a run of what this command does not name is not this command's to go on with.

    What only looks at a run may be dropped: its callbacks, loggers and evaluations.

    Raises:
        UserError: naming every target that neither the package has nor the command names.
    """
    needed = {key: value for key, value in before.items() if key not in _ONLY_LOOKS}
    own = {target for target in find_targets(needed) if target.startswith(_PACKAGE)}
    refuse_foreign(needed, named={*find_targets(cfg), *own})


def _check_sizes(before: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[Problem]:
    """What the parameters of a checkpoint do not show, or show less plainly."""
    if "model" not in before:
        return
    task, task_before = cfg.get("task"), before.get("task")
    if (task is None) != (task_before is None):
        what = "an encoder" if task_before is None else "a visual tokenizer"
        if task_before is not None and task_before.get("_target_") != _TOKENIZER_TASK:
            what = f"what task={task_before.get('_target_')} names"
        yield Problem("run.name", cfg["run"]["name"], f"its run trains {what}", _NEW_NAME)
        return
    nodes = [("model", cfg["model"], before["model"]), ("task", task or {}, task_before or {})]
    for key, node, node_before in nodes:
        if (was := node_before.get("_target_")) != (value := node.get("_target_")):
            rule = f"must be {was or 'left out'}, {_AS_BEFORE}"
            yield Problem(f"{key}._target_", value, rule, _NEW_NAME)
            return
    now, then = (model_shape(each["model"]).to_dict() for each in (cfg, before))
    sizes = {f"model.{key}": (then[key], now[key]) for key, value in now.items() if isinstance(value, int)}
    if task is not None and task_before is not None and task.get("_target_") == _TOKENIZER_TASK:
        fields = [field.name for field in dataclasses.fields(VisualTokenizerConfig)]
        sizes |= {f"task.{key}": (task_before[key], task.get(key)) for key in fields if key in task_before}
    for key, (was, value) in sizes.items():
        if was != value:
            yield Problem(key, value, f"must be {show(was)}, {_AS_BEFORE}", f"leave it out, or {_NEW_NAME}")
    yield from _check_fixed(*((UNSAID | dict(each))["adaptation"] for each in (before, cfg)))
    was, value = ((each.get("optimizer") or {}).get("_target_") for each in (before, cfg))
    if was is not None and was != value:  # which has another state
        rule = f"must be {was}, {_AS_BEFORE}"
        yield Problem("optimizer._target_", value, rule, f"leave optimizer=... out, or {_NEW_NAME}")


def _check_fixed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Arguments of an adaptation that say what the numbers of a checkpoint mean."""
    if before.get("_target_") != now.get("_target_"):
        return  # parameters will tell
    for key in getattr(find_target(str(now["_target_"])), "fixed", ()):
        if (was := before.get(key)) != (value := now.get(key)):
            rule = f"must be {show(was)}, {_AS_BEFORE}"
            yield Problem(f"adaptation.{key}", value, rule, f"leave it out, or {_NEW_NAME}")


def _find_idle(
    before: Mapping[str, Any], cfg: Mapping[str, Any], checkpoint: Path, *, done: int, is_over: bool
) -> Iterator[Problem]:
    """Changed settings that would change nothing, because the checkpoint holds what they decide on, or all is done."""
    if not before:
        return
    reported = set()
    for key, was, now in _held_by_checkpoint(before, cfg):
        reported.add(key)
        rule = f"is {show(was)} in the run that is continued, whose checkpoint decides"
        weights = "" if key == "model.weights" else f" {key}={show(now).replace(', ', ',')}"
        fix = f"leave it out, or start another run from these weights: run.name=NEW model.weights={checkpoint}{weights}"
        yield Problem(key, now, rule, fix)
    if not is_over:
        return
    is_stopped = done < cfg["trainer"]["max_steps"]
    echo = ("scheduler.max_steps", *(each["trainer"]["max_steps"] for each in (before, cfg)))
    for key, was, now in _compare("", fill_in(before), fill_in(cfg), _REPORTING):
        # What earlier versions did not know is not recorded either.
        if key not in reported and _has(before, key) and (key, was, now) != echo:
            all_done = f"training was stopped early at step {done}" if is_stopped else f"all {done} steps are done"
            go_on = "callbacks=[default] or more patience" if is_stopped else f"trainer.max_steps above {done}"
            rule = f"changes nothing, as {all_done}; it was {show(was)}"
            fix = f"leave it out, or train on with {go_on}"
            if key == "trainer.max_steps" and now < done:
                rule = f"must be {done} or more: so many steps are done already"
                earlier = f"step={now if checkpoint.with_name(f'step={now}.ckpt').is_file() else 'N'}"
                export = f"m2-export run.name={cfg['run']['name']} checkpoint={earlier}"
                fix = f"leave it out; for the model of an earlier one, {export}"
            yield Problem(key, now, rule, fix)


def _held_by_checkpoint(before: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, value then and value now of changed settings whose effect a checkpoint restores as it was."""
    nodes = [("optimizer", ""), ("scheduler", ""), ("adaptation", "start")]
    shared = active(before.get("objective") or {}).keys() & active(cfg.get("objective") or {}).keys()
    nodes += [(f"objective.{name}", "initial_") for name in sorted(shared)]
    for path, prefix in nodes:
        then, now = (_node(each, path) for each in (before, cfg))
        targets = [node.get("_target_") for node in (then, now)]
        if path == "scheduler" and all(target in _EXACT_SCHEDULES for target in targets):
            continue
        if targets[0] != targets[1] and path == "scheduler":
            yield f"{path}._target_", targets[0], targets[1]
        if None in targets or targets[0] != targets[1]:
            continue
        defaults = _defaults(str(targets[0]))
        for name in dict.fromkeys((*then, *now)):
            values = [node.get(name, defaults.get(name)) for node in (then, now)]
            if name not in _HYDRA_KEYS and name.startswith(prefix) and values[0] != values[1]:
                yield f"{path}.{name}", values[0], values[1]
    if "seed" in before and before["seed"] != cfg["seed"]:
        yield "seed", before["seed"], cfg["seed"]
    if "model" not in before:
        return
    configs = [
        dataclasses.asdict(model_shape(each["model"])) | {key: each["model"].get(key) for key in _STARTS}
        for each in (before, cfg)
    ]
    for key in _INITIAL:
        was, value = (config.get(key.partition(".")[2]) for config in configs)
        if was != value:
            yield key, was, value


def _node(cfg: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    node: Any = cfg
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def _has(cfg: Mapping[str, Any], key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return name in (_node(cfg, parent) if parent else cfg)


def _defaults(target: str) -> dict[str, Any]:
    """Default values of what a `_target_` names; sequences as lists, as configurations have them."""
    parameters = inspect.signature(find_target(target)).parameters.values()
    found = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _explain(name: str, said: str, before: Mapping[str, Any], cfg: Mapping[str, Any]) -> Problem:
    """Why a parameter may be another one: other objectives, or other settings of them."""
    begun, now = active(before.get("objective") or {}), active(cfg.get("objective") or {})
    own = name.split(".")[1] if name.startswith("objectives.") else None
    shared = begun.keys() & now.keys()
    if begun and begun.keys() != now.keys() and own not in shared:
        rule = f"must train the same parameters as [{','.join(begun)}], whose run is continued"
        fix = f"leave it out, or {_NEW_NAME}; weights may change, but not from or to 0"
        return Problem("objective", f"[{','.join(now)}]", rule, fix)
    changes = [
        change
        for each in now
        if each in shared and own in (None, each)
        for change in _compare(f"objective.{each}", begun[each], now[each])
        if change[0].split(".")[2] not in _FREE_OF_OBJECTIVES
    ]
    if own is None:
        changes += _compare("adaptation", *((UNSAID | dict(each))["adaptation"] for each in (before, cfg)))
    if len(changes) == 1:
        ((key, was, value),) = changes
        rule = f"was {show(was)} in the run that is continued, whose checkpoint does not fit"
        return Problem(key, value, rule, f"leave it as it was, or {_NEW_NAME}")
    fix = f"leave objective.{own} as it was, or {_NEW_NAME}" if changes and own else _NEW_NAME
    return Problem("run.name", cfg["run"]["name"], f"its checkpoint does not fit: {said}", fix)


def _find_misfit(module: lightning.LightningModule, content: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first parameter in which checkpoint and run differ, and how; None if there is none.

    Other shapes come first, as they say most; then missing, then needless ones, then what only one of both trains.
    """
    wanted, trained, unknown = _shapes(module)
    saved = {name: tuple(value.shape) for name, value in content["state_dict"].items() if not name.startswith(unknown)}
    for name in wanted:
        if name in saved and saved[name] != wanted[name]:
            return name, f"{name} is {saved[name]} there, {wanted[name]} now"
    for name in wanted:
        if name not in saved:
            return name, f"it has no {name}"
    for name in saved:
        if name not in wanted:
            return name, f"it has {name}, which nothing here trains"
    before = {name for state in content.get("optimizer_states", []) for name in _trained_names(state)}
    for name in sorted((trained ^ before) if before else ()):
        if not name.startswith(unknown):
            return name, f"{name} is {'not ' if name in trained else ''}trained there"
    return None


def _trained_names(state: Mapping[str, Any]) -> list[str]:
    """Names in the state of an optimizer; none where its groups do not say them."""
    return [name for group in state.get("param_groups", []) for name in group.get("names", [])]


def _shapes(module: lightning.LightningModule) -> tuple[Shapes, set[str], tuple[str, ...]]:
    """Shapes by name, the names of what is trained, and the prefixes of what is not known before it is built."""
    if not isinstance(module, PretrainModule):
        if is_overridden("configure_model", module):
            return {}, set(), ("",)  # it is built later; loading will tell
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        return {name: tuple(value.shape) for name, value in module.state_dict().items()}, trained, ()
    unknown: list[str] = []
    objectives = module.trained_objectives()
    model: Encoder = module.build_unfilled()
    with torch.device("meta"):
        model.freeze_parts(PARTS.keys() - frozenset().union(*(each.trained_parts() for each in objectives.values())))
        built: dict[str, nn.Module] = {"model.": model}
        for name, objective in objectives.items():
            head, copied = f"objectives.{name}.", _copy(objective)
            try:
                copied.build(cast("M2EncoderConfig", module.config))
            except UserError:
                raise
            except Exception as error:  # a user's own may want values, which nothing has here; loading will tell
                logger.info("%s cannot be compared with the checkpoint before it is built (%s)", head[:-1], error)
                unknown.append(head)
            else:
                built[head] = copied
    states = ((f"{head}{name}", value) for head, part in built.items() for name, value in part.state_dict().items())
    trained = {
        f"{head}{name}" for head, part in built.items() for name, each in part.named_parameters() if each.requires_grad
    }
    return {name: tuple(value.shape) for name, value in states}, trained, tuple(unknown)


def _copy(objective: Objective) -> Objective:
    """Without copying the frozen models that it holds in tuples, which are no sub-modules."""
    values = (value for part in objective.modules() for value in vars(part).values() if isinstance(value, tuple))
    return copy.deepcopy(
        objective, {id(each): each for value in values for each in value if isinstance(each, nn.Module)}
    )


def translate_load_error(error: Exception, run_name: str) -> UserError | None:
    """In place of torch's error, for a checkpoint that could not be compared earlier and does not load."""
    if not isinstance(error, RuntimeError) or _LOAD_ERROR not in str(error):
        return None
    lines = (line.strip(" \t.") for line in str(error).splitlines()[1:])
    first = next((line for line in lines if line), "torch does not say why")
    return UserError(f"its checkpoint does not fit: {first}; {_NEW_NAME}", key="run.name", value=run_name)
