"""Checks values against the signature or dataclass that takes them: names, missing ones, types and bounds.

The annotations are the only list of rules; pydantic tells whether a value keeps them. Every mistake gives a `Problem`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal, TypeVar, cast

from annotated_types import Ge, Len
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from m2_encoder.bounds import Example, KeysOf, Rule, describe, evaluate, find_names
from m2_encoder.config.problems import UNSET, find_problems, nearest, show
from m2_encoder.config.targets import TargetError, find_target
from m2_encoder.errors import NOTHING, Problem, UserError

T = TypeVar("T")
Parameters = Mapping[str, inspect.Parameter]

_STRICT: Final = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_PACKAGE: Final = "m2_encoder."
_SPECIAL_KEYS: Final = ("_target_", "_partial_", "_convert_", "_recursive_")
# Classes whose **kwargs go to something other than their parent.
_PASSED_ON: Final = (
    ("lightning.pytorch.strategies.ddp", "DDPStrategy", "torch.nn.parallel.DistributedDataParallel"),
    ("lightning.pytorch.loggers.tensorboard", "TensorBoardLogger", None),  # a class of a package that may be missing
)
# Takes *args and **kwargs, and refuses any.
_TAKES_NOTHING: Final = (("torch.nn.modules.module", "Module"),)
_ANY: Final = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
_VARIADIC: Final = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def check_targets(cfg: Any, *, given: Mapping[str, Sequence[str]], path: str = "") -> Iterator[Problem]:
    """Compares every node that has a `_target_` with the signature of what it names.

    `given` has, by path, the arguments that the command itself passes.
    """
    if isinstance(cfg, Mapping):
        if "_target_" in cfg:
            yield from _check_target(path, cfg, given.get(path, ()))
        for key, value in cfg.items():
            yield from check_targets(value, given=given, path=f"{path}.{key}".lstrip("."))
    elif isinstance(cfg, list):
        for index, value in enumerate(cfg):
            yield from check_targets(value, given=given, path=f"{path}[{index}]")


def _check_target(path: str, node: Mapping[str, Any], given: Sequence[str]) -> Iterator[Problem]:
    target, key = node["_target_"], f"{path}._target_"
    if target is UNSET:
        return
    try:
        called = find_target(target) if isinstance(target, str) else None
    except TargetError as error:
        yield Problem(key, target, error.rule, error.fix)
        return
    if not callable(called):
        yield Problem(key, target, "must be the dotted name of a class or function")
        return
    values = {name: value for name, value in node.items() if name not in _SPECIAL_KEYS}
    may_lack = bool(node.get("_partial_")) and not given
    yield from check_values(path, values, read_parameters(called), given=given, name=target, may_lack=may_lack)


def check_values(
    path: str,
    values: Mapping[str, Any],
    parameters: Parameters,
    *,
    given: Sequence[str] = (),
    name: str = "",
    may_lack: bool = False,
) -> Iterator[Problem]:
    """Compares values, by name of the argument, with parameters; those that are `UNSET` have been reported.

    Args:
        path: where the values stand.
        values: to compare.
        parameters: as `read_parameters` gives them.
        given: arguments that the caller passes itself.
        name: of what takes the values, for messages.
        may_lack: more arguments may come later.
    """
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    known = [item.name for item in parameters.values() if item.kind not in _VARIADIC and item.name not in given]
    for argument, value in values.items():
        key = f"{path}.{argument}".lstrip(".")
        if value is UNSET:
            continue
        if argument in given:
            yield Problem(key, value, "is set by the command itself", "leave it out")
        elif argument not in parameters:
            if not open_ended:
                takes = f"{name or path or 'the configuration'} has {', '.join(known) or 'no arguments'}"
                if name and not name.startswith(_PACKAGE):  # an experiment may set what ours has
                    takes += f"; ~{key} leaves it out"
                yield Problem(key, value, f"unknown argument{nearest(str(argument), known)}", takes)
        else:
            yield from _check_value(key, value, parameters[argument])
    for argument in known:
        item = parameters[argument]
        if item.default is item.empty and argument not in values and not may_lack:
            key = f"{path}.{argument}".lstrip(".")
            yield Problem(key, NOTHING, "is missing", f"add {key}={_sample(item.annotation)}")


def _check_value(key: str, value: Any, parameter: inspect.Parameter) -> Iterator[Problem]:
    annotation = parameter.annotation
    objects = [value, *value.values()] if isinstance(value, Mapping) else []
    if any(isinstance(node, Mapping) and "_target_" in node for node in objects) and not _is_plain(annotation):
        return  # an object of its own, or several by name
    if lacks(value):
        return
    settings = _settings_of(annotation)
    is_null = value is None and settings is not annotation
    if settings is not None and isinstance(value, Mapping):
        yield from check_values(key, value, read_parameters(settings))
    elif settings is not None and not is_null:
        yield Problem(key, value, f"must be {describe(annotation)} of keys", f"for example {key}.KEY=VALUE")
    elif not _is_allowed(value, annotation):
        options = _options(annotation)
        words = [value] if isinstance(value, str) else list(value) if isinstance(value, Mapping) else []
        hint = next((nearest(str(word), options) for word in words if word not in options), "")
        yield Problem(key, value, f"must be {describe(annotation, value)}{hint}", _example(key, parameter))
    else:
        for keys in (each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, KeysOf)):
            nodes = {f"{key}.{name}": node for name, node in value.items()} if keys.each else {key: value}
            for path, node in nodes.items():
                if node is not None:
                    yield from check_values(path, node, read_parameters(keys.called), given=keys.given)


def check_settings(settings: Any, cfg: Mapping[str, Any], path: str = "") -> list[Problem]:
    """Everything that is wrong with values from which a dataclass of settings is to be made, relations included."""
    problems = list(check_values(path, cfg, read_parameters(settings)))
    if problems or lacks(cfg):
        return problems
    try:
        make_settings(settings, cfg)
    except UserError as error:
        return find_problems(error.under(path) if path else error)
    return []


def make_settings(settings: type[T], cfg: Mapping[str, Any]) -> T:
    """A dataclass of settings, with dataclasses inside, from checked values.

    Raises:
        UserError: as its own constructor.
    """
    arguments = {}
    for name, item in read_parameters(cast("Any", settings)).items():
        if name in cfg:
            inner, value = _settings_of(item.annotation), cfg[name]
            if inner is not None and isinstance(value, Mapping):
                try:
                    value = make_settings(inner, value)
                except UserError as error:
                    raise error.under(name) from error
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return settings(**arguments)


@functools.cache
def read_parameters(called: Any) -> Parameters:
    """Parameters by name, annotations evaluated where that is possible.

    A class that passes `**kwargs` on to its parent also has the parent's.
    """
    owners = [called]
    if inspect.isclass(called):
        owners = [cls for cls in called.__mro__ if "__init__" in vars(cls) and cls is not object]
    found: dict[str, inspect.Parameter] = {}
    if not owners and called.__new__ is object.__new__:
        return found  # a class without a constructor
    for owner in owners:
        if (owner.__module__, getattr(owner, "__name__", "")) in _TAKES_NOTHING:
            return found
        function = inspect.unwrap(vars(owner)["__init__"]) if inspect.isclass(owner) else inspect.unwrap(owner)
        names = find_names(owner) if dataclasses.is_dataclass(owner) else None
        names = names or getattr(function, "__globals__", {})
        own = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(owner) else 0 :]
        for item in own:
            if item.kind not in _VARIADIC:
                found.setdefault(item.name, item.replace(annotation=evaluate(item.annotation, names)))
        if inspect.Parameter.VAR_KEYWORD not in [item.kind for item in own]:
            return found
        for module, name, further in _PASSED_ON:
            if (owner.__module__, owner.__name__) != (module, name):
                continue
            if further is None:
                return found | _ANY
            options = read_parameters(find_target(further)).items()
            found = {**{key: item for key, item in options if item.default is not item.empty}, **found}
    return found | _ANY


def make_optional(parameters: Parameters) -> Parameters:
    """The same parameters, each of which may be null or left out."""
    return {name: item.replace(annotation=item.annotation | None, default=None) for name, item in parameters.items()}


def _is_allowed(value: Any, annotation: Any) -> bool:
    if annotation in (Any, inspect.Parameter.empty):
        return True
    try:
        TypeAdapter(_plain(annotation), config=_STRICT).validate_python(value)
    except ValidationError:
        return False
    except (PydanticUserError, TypeError):
        return True  # an annotation that is none for pydantic: the constructor knows
    return True


def _plain(annotation: Any) -> Any:
    """An annotation of what YAML can say: lists for tuples, texts for paths."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[(_plain(inner[0]), *annotation.__metadata__)]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_plain(item) for item in inner)]  # noqa: UP007 - of items that are known only now
    if origin is tuple:
        if inner[1:] == (Ellipsis,):
            return list[_plain(inner[0])]  # type: ignore[misc]
        return Annotated[list[typing.Union[tuple(_plain(item) for item in inner)]], Len(len(inner), len(inner))]  # type: ignore[misc]  # noqa: UP007
    if inspect.isclass(annotation) and issubclass(annotation, PurePath):
        return str
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return list[_plain(inner[0])]  # type: ignore[misc]
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return dict[_plain(inner[0]), _plain(inner[1])]  # type: ignore[misc]
    return annotation


def _is_plain(annotation: Any) -> bool:
    """Whether only numbers, texts, flags and null are allowed."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _is_plain(inner[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(_is_plain(item) for item in inner)
    return annotation in (int, float, str, bool, None, type(None)) or typing.get_origin(annotation) is Literal


def _settings_of(annotation: Any) -> type | None:
    """The dataclass that an annotation names, alone or beside null."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((item for item in inner if dataclasses.is_dataclass(item) and isinstance(item, type)), None)
    return annotation if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) else None


def _options(annotation: Any) -> list[str]:
    """Words that an annotation allows."""
    if typing.get_origin(annotation) is Literal:
        return [item for item in typing.get_args(annotation) if isinstance(item, str)]
    return [word for item in typing.get_args(annotation) for word in _options(item)]


def lacks(node: Any) -> bool:
    """Whether there is a value in a node that was not given."""
    if isinstance(node, Mapping | list):
        return any(lacks(item) for item in (node.values() if isinstance(node, Mapping) else node))
    return node is UNSET


def _example(key: str, parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty or _metadata(parameter.annotation, Rule):
        return f"for example {key}={_sample(parameter.annotation)}"
    options = _options(parameter.annotation)
    if options and parameter.default in ((), []):  # a shipped file may choose some
        return f"for example {key}=[{options[0]}]"
    return f"its default is {key}={show(parameter.default)}"


def _sample(annotation: Any) -> str:
    texts = [each.text for each in _metadata(annotation, Example)]
    texts += [each.example for each in _metadata(annotation, Rule)]
    if found := next(filter(None, texts), None):
        return found
    if typing.get_origin(annotation) is Literal:
        return str(typing.get_args(annotation)[0])
    if options := _options(annotation):
        return options[0]
    least = [max(1, each.ge) for each in _metadata(annotation, Ge) if isinstance(each.ge, int)]
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return str(least[0]) if least else {bool: "true", int: "1", float: "0.1", str: "TEXT"}.get(base, "VALUE")


def _metadata(annotation: Any, kind: type[T]) -> list[T]:
    own = [each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, kind)]
    return own + [found for item in typing.get_args(annotation) for found in _metadata(item, kind)]
