"""Everything with a `_target_` against the signature it will be called with: names, missing arguments, plain types."""

from __future__ import annotations

import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from m2_encoder.config.problems import UNSET, flatten, nearest, show
from m2_encoder.config.rules import Problem, is_number, is_whole

_SPECIAL_KEYS: Final = ("_target_", "_partial_", "_convert_", "_recursive_")
# Classes whose **kwargs go to something other than their parent.
_PASSED_ON: Final = (("lightning.pytorch.strategies.ddp", "DDPStrategy", "torch.nn.parallel.DistributedDataParallel"),)
# Takes *args and **kwargs, and refuses any.
_TAKES_NOTHING: Final = (("torch.nn.modules.module", "Module"),)
_PLAIN_TYPES: Final[dict[Any, Callable[[Any], bool]]] = {
    None: lambda value: value is None,
    type(None): lambda value: value is None,
    bool: lambda value: isinstance(value, bool),
    int: is_whole,
    float: is_number,
    str: lambda value: isinstance(value, str),
}
_VARIADIC: Final = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def check_targets(
    cfg: Mapping[str, Any], *, given: Mapping[str, Sequence[str]], skip: Callable[[str], bool]
) -> list[Problem]:
    """Compares every node that has a `_target_` with the signature of what it names.

    Args:
        cfg: plain containers.
        given: by path, the arguments that the command itself passes.
        skip: whether a key has been reported already.
    """
    problems: list[Problem] = []
    for path, node in _walk(cfg, ""):
        problems += _check_node(path, node, given.get(path, ()), skip)
    return problems


def _walk(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]")


def _check_node(
    path: str, node: Mapping[str, Any], given: Sequence[str], skip: Callable[[str], bool]
) -> Iterator[Problem]:
    target, key = node["_target_"], f"{path}._target_"
    if target is UNSET:
        return
    try:
        called = pkgutil.resolve_name(target) if isinstance(target, str) else None
    except Exception as error:  # importing a module can raise anything
        yield Problem(key, f"{key}={show(target)}: cannot be imported ({flatten(error)}); check the dotted name")
        return
    if not callable(called):
        yield Problem(key, f"{key}={show(target)}: must be the dotted name of a class or function")
        return
    parameters = _parameters(called)
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    known = [name for name, item in parameters.items() if item.kind not in _VARIADIC and name not in given]
    for name, value in node.items():
        full = f"{path}.{name}"
        if name in _SPECIAL_KEYS or skip(full):
            continue
        if name in given:
            yield Problem(full, f"{full}={show(value)}: is set by the command itself; leave it out")
        elif name not in parameters:
            if not open_ended:
                takes = f"{target} takes {', '.join(known) or 'no arguments'}"
                yield Problem(full, f"{full}={show(value)}: unknown argument{nearest(name, known)}; {takes}")
        elif not _fits(value, parameters[name].annotation):
            wanted = describe(parameters[name].annotation)
            yield Problem(full, f"{full}={show(value)}: must be {wanted}; {_example(path, name, parameters[name])}")
    for name in known:
        item = parameters[name]
        if item.default is item.empty and name not in node and not _may_come_later(node, given):
            full = f"{path}.{name}"
            yield Problem(full, f"{full}: is missing; add {full}={_sample(item.annotation)}")


def _may_come_later(node: Mapping[str, Any], given: Sequence[str]) -> bool:
    """Whether a partial may get arguments that this table does not know of."""
    return bool(node.get("_partial_")) and not given


def _parameters(called: Any) -> dict[str, inspect.Parameter]:
    """Parameters by name, annotations evaluated where that is possible.

    A class that passes `**kwargs` on to its parent also has the parent's.
    """
    owners = [called]
    if inspect.isclass(called):
        owners = [cls for cls in called.__mro__ if "__init__" in vars(cls) and cls is not object]
    found: dict[str, inspect.Parameter] = {}
    for owner in owners:
        if (owner.__module__, getattr(owner, "__name__", "")) in _TAKES_NOTHING:
            return found
        function = vars(owner)["__init__"] if inspect.isclass(owner) else owner
        function = inspect.unwrap(function)
        own = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(owner) else 0 :]
        kinds = [item.kind for item in own]
        for item in own:
            annotation = _evaluate(item.annotation, getattr(function, "__globals__", {}))
            if item.kind not in _VARIADIC:
                found.setdefault(item.name, item.replace(annotation=annotation))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found
        for module, name, further in _PASSED_ON:
            if (owner.__module__, owner.__name__) == (module, name):
                options = _parameters(pkgutil.resolve_name(further)).items()
                found = {**{key: item for key, item in options if item.default is not item.empty}, **found}
    found["kwargs"] = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return found


def _evaluate(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        # Our own source and that of installed libraries, evaluated where it was written.
        return eval(annotation, dict(names))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any  # a name that exists for type checkers only


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value can be meant by an annotation; what is not plain is left to the constructor."""
    if value is UNSET or annotation in (Any, inspect.Parameter.empty):
        return True
    if isinstance(value, Mapping) and "_target_" in value:
        return not _is_plain(annotation)
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, item) for item in inner)
    if origin is Literal:
        return any(type(value) is type(item) and value == item for item in inner)
    if annotation in _PLAIN_TYPES:
        return _PLAIN_TYPES[annotation](value)
    container = origin or annotation
    return _fits_class(value, container, inner) if inspect.isclass(container) else True


def _fits_class(value: Any, container: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(container, Mapping):
        values = list(value.values()) if isinstance(value, Mapping) else None
        return values is not None and (len(inner) < 2 or all(_fits(item, inner[1]) for item in values))
    if issubclass(container, Sequence):
        items = [item for item in inner if item is not Ellipsis]
        same = len(items) == 1
        return isinstance(value, list) and (not same or all(_fits(item, items[0]) for item in value))
    return not isinstance(value, bool | int | float | list | None)


def _is_plain(annotation: Any) -> bool:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(_is_plain(item) for item in inner)
    return annotation in _PLAIN_TYPES


def describe(annotation: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(item) for item in inner))
    if origin is Literal:
        return f"one of {', '.join(show(item) for item in inner)}"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        None: "null",
        type(None): "null",
    }
    if annotation in words:
        return words[annotation]
    container = origin or annotation
    if inspect.isclass(container):
        if issubclass(container, Mapping):
            return "a mapping"
        if issubclass(container, Sequence):
            return f"a list of {describe(inner[0])}" if inner else "a list"
        return f"a {container.__name__}"
    return str(annotation)


def _sample(annotation: Any) -> str:
    return {bool: "true", int: "1", float: "0.1", str: "TEXT"}.get(annotation, "VALUE")


def _example(path: str, name: str, item: inspect.Parameter) -> str:
    if item.default is item.empty:
        return f"for example {path}.{name}={_sample(item.annotation)}"
    default = list(item.default) if isinstance(item.default, tuple) else item.default
    return f"its default is {path}.{name}={show(default)}"
