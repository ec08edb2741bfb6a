"""The part of `m2-evaluate` that measures models, ours and others', on sets that are read from disk."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from torch import nn
from torch.distributed import ProcessGroup

from m2_encoder.config.model_choice import arguments_of_load, is_model_name, model_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import Unset, find_problems, refuse_all
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import Problem, UserError, abridge, under
from m2_encoder.evaluation.cost import held_bytes, measure_cost
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.opening import KINDS, open_model
from m2_encoder.evaluation.records import Record
from m2_encoder.evaluation.report.page import Gallery, ModelFacts, write_page
from m2_encoder.evaluation.report.terminal import cost_table, record_tables
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.tables import print_cells
from m2_encoder.evaluation.tasks.base import EvaluationContext, TaskResult
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.record import describe_run

if TYPE_CHECKING:
    from rich.console import Console

_LIBRARIES: Final = {
    "open_clip": "open_clip",
    "hf": "transformers",
    "sentence-transformers": "sentence_transformers",
}
_COST_ITEMS: Final = 8  # pictures and texts that times are taken of


def is_suite(node: Any) -> bool:
    """Whether an entry of `evaluation` is a suite."""
    try:
        target = find_target(str(node["_target_"])) if isinstance(node, Mapping) and "_target_" in node else None
    except TargetError:  # which is reported for the entry
        return False
    return isinstance(target, type) and issubclass(target, Suite)


def list_models_of(cfg: Mapping[str, Any]) -> list[str]:
    """The models that `model` names, one or several."""
    model = cfg["model"]
    if isinstance(model, Unset):
        return []  # which is reported
    return [str(each) for each in model] if isinstance(model, Sequence) and not isinstance(model, str) else [str(model)]


def check_models(cfg: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with `model` where it is not one model of this project, before any is loaded."""
    models, names = list_models_of(cfg), cfg["evaluation"] if isinstance(cfg["evaluation"], Mapping) else {}
    rest = [name for name, node in names.items() if not is_suite(node)]
    if not models and not isinstance(cfg["model"], Unset):
        yield Problem("model", cfg["model"], "names no model", "give one, or several as model=[A,B]")
    if twice := [model for model, count in Counter(models).items() if count > 1]:
        yield Problem("model", cfg["model"], f"names {twice[0]} twice", "give each model once")
    if cfg["page"] is not None and names and len(rest) == len(names):
        yield Problem("page", cfg["page"], "is of what suites find", "choose suites, such as evaluation=[emoji]")
    if models and rest and (len(models) > 1 or _kind(models[0])):
        rule = f"evaluation.{rest[0]} measures one model of this project"
        yield Problem("model", cfg["model"], rule, "choose suites, such as evaluation=[emoji]")
    for key in ("weights", "tokenizer"):
        if len(models) > 1 and cfg[key] is not None:
            yield Problem(key, cfg[key], "goes with one model, and there are several", "export that model first")
    for model in dict.fromkeys(models):
        if _kind(model):
            yield from (Problem("model", model, f"no such file or folder: {path}") for path in _missing(model))
        elif not _is_folder(model):
            yield from model_problems({**cfg, "model": model})


def _kind(model: str) -> str:
    """What comes before the colon of somebody else's model; "" for ours, and for a folder."""
    kind, colon, _ = model.partition(":")
    return kind if colon and kind in KINDS else ""


def _missing(model: str) -> list[str]:
    """Places on this machine that somebody else's model names, and where nothing is; names of a hub are no places."""
    kind, _, place = model.partition(":")
    if kind == "features":
        paths = place.split(",")
    else:
        is_place = kind == "sentence-transformers" or place.startswith(("/", "./", "../", "~"))
        paths = [place] if is_place and kind != "open_clip" else []
    return [path for path in paths if path and not Path(path).expanduser().exists()]


def _is_folder(model: str) -> bool:
    """A folder of any kind; whether it holds a model is asked when it is opened."""
    return not is_model_name(model) and find_path(model).is_dir()


class Measured(NamedTuple):
    """What suites found of all models."""

    title: str
    records: list[Record]
    facts: list[ModelFacts]
    galleries: list[Gallery]
    left_out: dict[str, list[str]]  # pictures that could not be used and why, by set
    failed: list[Exception]  # of models and sets that could not be measured; numbers of the others are here

    def add(self, facts: ModelFacts, results: Sequence[TaskResult]) -> None:
        """Takes what was found of a model."""
        self.facts.append(facts)
        for result in results:
            self.records.extend(result.records)
            self.galleries.extend(result.galleries)
            for name, lines in result.left_out.items():
                self.left_out[name] = list(dict.fromkeys([*self.left_out.get(name, ()), *lines]))

    def print(self, console: Console) -> None:
        """Prints tables, and what was left out."""
        for table in record_tables(self.records):
            console.print()
            print_cells(console, table)
        if len(self.facts) > 1:
            print_cells(console, cost_table(self.facts))
        for name, lines in self.left_out.items() if is_first_rank() else ():
            say(f"{name}: pictures that could not be used: {len(lines):,}, such as {abridge(lines[0])}")

    def to_dict(self) -> dict[str, Any]:
        """What goes to the output file: the models, a record for every number, and the pictures left out."""
        return {
            "models": [each._asdict() for each in self.facts],
            "records": [each.to_dict() for each in self.records],
            "left_out": self.left_out,
            "failed": [" ".join(str(each).split()) for each in self.failed],
        }

    def write_page(self, path: Path) -> None:
        """Writes the page.

        Raises:
            UserError: if it cannot be written.
        """
        about = {"command": shlex.join(["m2-evaluate", *sys.argv[1:]]), **_about()}
        about |= {"not measured": "; ".join(self.to_dict()["failed"])} if self.failed else {}
        more: dict[str, Any] = {"title": self.title, "facts": about, "left_out": self.left_out}
        write_page(path, self.records, self.facts, self.galleries, **more)
        say(f"page: {path}")


def measure_suites(
    cfg: Mapping[str, Any], suites: Mapping[str, Suite], console: Console, group: ProcessGroup | None = None
) -> Measured:
    """Measures all models on all suites that are prepared, one model at a time, and prints tables.

    Ranks of a `group` share the pictures and texts; each ends with all numbers.

    Features are kept in `cfg["features"]` as they come, so that the same command goes on where it was stopped. A model
    that fails does not keep the others from being measured.

    Raises:
        UserError: if no model could be measured.
    """
    _look_at_sets(suites)
    names = _distinct_names(list_models_of(cfg))
    for kind in {_kind(spec) for spec in names}:  # so that their libraries count as no model's memory
        with suppress(ImportError):
            importlib.import_module(_LIBRARIES.get(kind, "torch"))
    found = Measured("", [], [], [], {}, [])
    for spec, called in names.items():
        try:
            facts, results, failed = _measure_model(cfg, spec, called, suites, console, group)
        except Exception as error:  # whatever a peer's library raises
            if len(names) == 1:
                raise
            found.failed.append(_of_model(error, spec))
            continue
        found.failed.extend(failed if len(names) == 1 else [_with_name(each, called) for each in failed])
        if results:
            found.add(facts, results)
    if not found.facts:
        refuse_failed(found.failed)
    found.print(console)
    return found._replace(title=f"{', '.join(each.name for each in found.facts)} on {', '.join(suites)}")


def _look_at_sets(suites: Mapping[str, Suite]) -> None:
    """Says which languages are nowhere; refuses two sets of one name, which could not be told apart later."""
    owners: dict[str, str] = {}
    for suite, task in suites.items():
        if task.absent_languages and is_first_rank():
            say(f"{suite}: no set has texts in {', '.join(task.absent_languages)}")
        for name, dataset in task.sets.items():
            place = f"evaluation.{suite}.sets.{name}"
            if (owner := owners.setdefault(dataset.name, place)) != place:
                raise UserError(f"its set is called {dataset.name}, as that of {owner}; give name", key=place)


def _with_name(error: Exception, called: str) -> Exception:
    """The same error of a set with the model that it is of, if it does not say that."""
    if not isinstance(error, UserError) or called in error.text:
        return error
    return UserError(f"{called}: {error.text}", key=error.key, value=error.value)


def refuse_failed(failed: Sequence[Exception]) -> None:
    """Raises what went wrong, if anything did: all mistakes of the user at once, or else the first of other errors."""
    mistakes = [each for each in failed if isinstance(each, UserError)]
    others = [each for each in failed if not isinstance(each, UserError)]
    if others:
        raise others[0]
    refuse_all([problem for each in mistakes for problem in find_problems(each)])


def _of_model(error: Exception, spec: str) -> Exception:
    """The same error with the model that it is of."""
    if isinstance(error, UserError) and error.key is None and not error.problems:
        return UserError(error.text, key="model", value=spec)
    return error


def _measure_model(
    cfg: Mapping[str, Any],
    spec: str,
    called: str,
    suites: Mapping[str, Suite],
    console: Console,
    group: ProcessGroup | None,
) -> tuple[ModelFacts, list[TaskResult], list[Exception]]:
    """One model: its facts, what was found on each set, and what failed on others; nothing else is left in memory."""
    held = held_bytes()
    with console.status(f"{called}: opening"):
        model = _open(cfg, spec, called)
    with console.status(f"{called}: encoding and measuring"):
        store = None if cfg["features"] is None else find_path(cfg["features"])
        more: dict[str, Any] = {"batch_size": cfg["batch_size"], "num_workers": cfg["num_workers"], "group": group}
        with FeatureEncoder(model, store=store, **more) as encoder:
            context = EvaluationContext(
                model=cast("nn.Module", model.model), tokenizer=model.tokenizer, sets={}, files=encoder
            )
            results, failed = _measure_sets(suites, context)
            if not results and len({str(getattr(each, "text", each)) for each in failed}) == 1:
                raise _of_all_sets(failed[0])
        is_compared = len(list_models_of(cfg)) > 1 or cfg["page"] is not None
        return _facts(model, suites, cfg, held) if is_compared else _bare_facts(model), results, failed


def _of_all_sets(error: Exception) -> Exception:
    """The same error without the set that it came from: it is the model's."""
    return UserError(error.text) if isinstance(error, UserError) else error


def _measure_sets(suites: Mapping[str, Suite], context: EvaluationContext) -> tuple[list[TaskResult], list[Exception]]:
    """Set by set: one that cannot be used does not keep the others from being measured."""
    results: list[TaskResult] = []
    failed: list[Exception] = []
    for suite, task in suites.items():
        for name in task.sets:
            try:
                with under(f"evaluation.{suite}.sets.{name}"):
                    results.append(task.measure_sets(context, [name]))
            except Exception as error:  # noqa: PERF203 - once per set; whatever a peer's library raises
                failed.append(error)
    return results, failed


def _open(cfg: Mapping[str, Any], spec: str, name: str) -> EvaluatedModel:
    path = spec if _kind(spec) or is_model_name(spec) else str(find_path(spec))
    try:
        return open_model(path, name=name, trust=cfg["trust"], **arguments_of_load(cfg))
    except UserError as error:
        raise _of_model(error, spec) from error


def _distinct_names(specs: Sequence[str]) -> dict[str, str]:
    """What each model is called: the last part of its path that tells it from the others."""
    places = {spec: spec.partition(":")[2] if _kind(spec) else spec for spec in specs}
    places = {spec: place.split(",")[0] if _kind(spec) == "features" else place for spec, place in places.items()}
    parts = {spec: [part for part in place.split("/") if part not in ("", "export")] for spec, place in places.items()}
    last = {spec: found[-1] if found else spec for spec, found in parts.items()}
    return {spec: name if list(last.values()).count(name) == 1 else spec for spec, name in last.items()}


def _bare_facts(model: EvaluatedModel) -> ModelFacts:
    known = model.facts
    return ModelFacts(
        model.name,
        known.parameters or None,
        known.weight_bytes or None,
        known.embed_dim or None,
        known.image_size or None,
    )


def _facts(model: EvaluatedModel, suites: Mapping[str, Suite], cfg: Mapping[str, Any], held: int) -> ModelFacts:
    """With what it costs, measured now on the first usable pictures, and texts beside; `held` were there before it."""
    if model.model is None:
        return _bare_facts(model)
    for first in (dataset for task in suites.values() for dataset in task.sets.values()):
        if contents := list(islice(_usable(first, model), _COST_ITEMS)):
            break
    else:
        return _bare_facts(model)
    texts = [text for found in first.texts.values() for text in found.rows[:_COST_ITEMS]] or ["a photo", "照片"]
    size = min(32, cfg["batch_size"])
    cost = measure_cost(model, contents, texts, batch_size=size, held=held)
    return _bare_facts(model)._replace(
        peak_mb=cost.get("peak_memory_mb"),
        ms_per_image=cost.get(f"image_ms@{size}"),
        ms_per_text=cost.get(f"text_ms@{size}"),
        batch_size=size if cost else None,
    )


def _usable(found: EvaluationSet, model: EvaluatedModel) -> Iterator[bytes]:
    """Contents of pictures that the model takes."""
    for picture in found.pictures:
        try:
            content = picture.read()
            model.preprocess(content)
        except (UserError, OSError):
            continue
        yield content


def _about() -> dict[str, str]:
    """Where and with what this was measured, in lines."""
    found = describe_run()
    machine = found.get("machine", {})
    lines = {
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items() if value),
        "versions": ", ".join(f"{key} {value}" for key, value in found.get("versions", {}).items() if value),
        "revision": str(found.get("git_revision") or ""),
    }
    return {key: value for key, value in lines.items() if value}
