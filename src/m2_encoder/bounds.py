"""Bounds of arguments, written once: in the signature or dataclass that takes the value.

    @check_bounds
    def __init__(self, *, weight: Annotated[float, Ge(0)] = 1.0, mode: Literal["fast", "slow"] = "fast") -> None: ...

A call with another value is refused with a `UserError` that names the argument. Commands read the same annotations
before anything is called (`config/check.py`), so that they can list all mistakes at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, ParamSpec, TypeVar, cast

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen, Predicate

from m2_encoder.errors import Problem, UserError

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Rule(Predicate):
    """A bound that only code can say.

    Attributes:
        text: what the value must be, in words, after "must be".
        example: a value that is fine, as one types it.
    """

    text: str = ""
    example: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A value that is fine, as one types it, for an argument without a default."""

    text: str


@dataclasses.dataclass(frozen=True)
class KeysOf:
    """Says of a mapping that its keys are the arguments of a class.

    Attributes:
        called: the class.
        each: whether this holds for each value of the mapping instead, where it is not null.
        given: arguments that whoever calls the class adds.
    """

    called: Callable[..., Any]
    each: bool = False
    given: tuple[str, ...] = ()


_LARGE: Final = 100


class _Far:
    """Says that the ceiling before it is far above what exists: it is told to those alone who gave a large number."""


# Such ceilings stop a slip of the keyboard before it costs memory, time or an overflow.
FAR: Final = _Far()
Count = Annotated[int, Ge(1), Le(10**9), FAR]
Index = Annotated[int, Ge(0), Le(10**9), FAR]
Many = Annotated[int, Ge(1), Le(2**40), FAR]
Rows = Annotated[int, Ge(1), Le(2**24), FAR]  # of a batch
Tokens = Annotated[int, Ge(2), Le(2**20), FAR]  # of a text
Pixels = Annotated[int, Ge(1), Le(2**16), FAR]  # of the side of an image
Workers = Annotated[int, Ge(0), Le(1024), FAR]  # processes or threads
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Seconds = Annotated[float, Gt(0), Le(10**6), FAR]  # of a wait; the system's calls take no more than a few weeks
Positive = Annotated[float, Gt(0), Le(10**9), FAR]
Temperature = Annotated[float, Ge(1e-4), Le(10**4), FAR]  # its inverse is finite in every precision
NotNegative = Annotated[float, Ge(0), Le(10**9), FAR]
Score = Annotated[float, Ge(-(10**9)), Le(10**9), FAR]  # a metric
Aspect = Annotated[float, Ge(1), Le(10**6), FAR]  # longer side over shorter side
Fraction = Annotated[float, Ge(0), Le(1)]
Text = Annotated[str, Rule(lambda text: bool(text.strip()), "a text", "TEXT")]


def _names_paths(value: str | Sequence[str]) -> bool:
    parts = [value] if isinstance(value, str) else value
    return bool(parts) and all(part.strip() for part in parts)


Paths = Annotated[
    str | Sequence[str], Rule(_names_paths, "a path, a url, a pattern such as data/*.tar, or a list of them", "PATHS")
]


def check_bounds(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function or constructor refuse arguments outside the bounds of its annotations.

    The `UserError` has the argument as its key, or all of them as problems.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse(find_faults(_bounds_of(function), signature.bind(*args, **kwargs).arguments))
        return function(*args, **kwargs)

    return checked


def check_fields(instance: Any) -> None:
    """Refuses a dataclass with a field outside the bounds of its annotation; for `__post_init__`.

    Raises:
        UserError: as `check_bounds`.
    """
    refuse(find_faults(_bounds_of(cast("Any", type(instance))), vars(instance)))


def refuse(problems: Sequence[Problem]) -> None:
    """Raises what is wrong, if anything is.

    Raises:
        UserError: with one problem as its own, or with all.
    """
    if len(problems) == 1:
        raise UserError("; ".join(filter(None, problems[0][2:])), key=problems[0].key, value=problems[0].value)
    if problems:
        lines = (f"{each.key}={each.value}: {'; '.join(filter(None, each[2:]))}" for each in problems)
        raise UserError("; ".join(lines), problems=problems)


def find_faults(bounds: Mapping[str, Any], values: Mapping[str, Any]) -> list[Problem]:
    """A problem for each value that its annotation does not allow."""
    return [
        Problem(name, values[name], f"must be {describe(annotation, values[name])}")
        for name, annotation in bounds.items()
        if name in values and not fits(values[name], annotation)
    ]


@functools.cache
def _bounds_of(called: Callable[..., Any]) -> dict[str, Any]:
    """Annotations with bounds, by name of the argument."""
    names = find_names(called)
    items = inspect.signature(called).parameters.values()
    evaluated = {item.name: evaluate(item.annotation, names) for item in items}
    return {name: annotation for name, annotation in evaluated.items() if _has_bounds(annotation)}


def find_names(called: Any) -> dict[str, Any]:
    """The names that annotations of a function or a class may use; fields of its parents stand in other modules."""
    owners = reversed(called.__mro__) if inspect.isclass(called) else [called]
    return {name: value for owner in owners for name, value in vars(sys.modules[owner.__module__]).items()}


def evaluate(annotation: Any, names: Mapping[str, Any]) -> Any:
    """An annotation that may still be source text, where it was written; Any if it exists for type checkers only."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def _has_bounds(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    return origin in (Annotated, Literal) or any(_has_bounds(item) for item in typing.get_args(annotation))


def fits(value: Any, annotation: Any) -> bool:
    """Whether numbers, choices and what is made of them keep their bounds; other types are not looked at."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, inner[0]) and all(_keeps(value, bound) for bound in annotation.__metadata__)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, item) for item in inner)
    if origin is Literal:
        return any(type(value) is type(item) and value == item for item in inner)
    if annotation is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if annotation is float:
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    if annotation in (None, type(None), str, bool):
        return isinstance(value, annotation or type(None))
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        items = [item for item in inner if item is not Ellipsis]
        return (
            isinstance(value, Sequence) and not isinstance(value, str) and all(fits(each, items[0]) for each in value)
        )
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    return True


def _keeps(value: Any, bound: Any) -> bool:
    match bound:
        case Ge(ge=least):
            return bool(value >= least)
        case Gt(gt=least):
            return bool(value > least)
        case Le(le=most):
            return bool(value <= most)
        case Lt(lt=most):
            return bool(value < most)
        case Len(min_length=least, max_length=most):
            return bool(least <= len(value) <= (math.inf if most is None else most))
        case MinLen(min_length=least):
            return len(value) >= least
        case Predicate(func=holds):
            return bool(holds(value))
        case _:
            return True


_WORDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", None: "null", type(None): "null",
}  # fmt: skip

_PLURAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def describe(annotation: Any, value: Any = None) -> str:
    """What an annotation allows, in words: "a whole number, 1 or more, or null".

    Args:
        annotation: to describe.
        value: what was given; ceilings that nobody comes near are only said of one that is large.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        rules = [each.text for each in annotation.__metadata__ if isinstance(each, Rule)]
        words = _describe_base(annotation, value), _describe_bounds(annotation, value)
        return rules[0] if rules else ", ".join(filter(None, words))
    if origin in (typing.Union, types.UnionType):
        parts = list(dict.fromkeys(describe(item, value) for item in inner))
        return f"{parts[0]}{',' if ',' in parts[0] else ''} or {' or '.join(parts[1:])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if annotation in _WORDS:
        return _WORDS[annotation]
    container = origin or annotation
    if inspect.isclass(container):
        if issubclass(container, Mapping) or dataclasses.is_dataclass(container):
            return "a mapping"
        if issubclass(container, Sequence):
            return f"a list of {_PLURAL.get(_base(inner[0]), describe(inner[0], value))}" if inner else "a list"
        return f"a {container.__name__}"
    return str(annotation)


def _is_large(value: Any) -> bool:
    """Whether a number is, or one inside of what was given."""
    if isinstance(value, Mapping):
        return any(_is_large(each) for each in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_is_large(each) for each in value)
    return isinstance(value, int | float) and abs(value) > _LARGE


def _base(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _describe_base(annotation: Any, value: Any) -> str:
    base = typing.get_args(annotation)[0]
    lengths = [each for each in annotation.__metadata__ if isinstance(each, Len)]
    if lengths and typing.get_args(base):
        item = typing.get_args(base)[0]
        bounds = _describe_bounds(item, value) if typing.get_origin(item) is Annotated else ""
        return ", each ".join(filter(None, (f"{lengths[0].min_length} {_PLURAL.get(_base(item), 'items')}", bounds)))
    return describe(base, value)


def _describe_bounds(annotation: Any, value: Any) -> str:
    least = most = ""
    for each in annotation.__metadata__:
        match each:
            case Ge(ge=bound):
                least = f"{bound} or more"
            case Gt(gt=bound):
                least = f"above {bound}"
            case Le(le=bound):
                most = f"at most {bound}"
            case Lt(lt=bound):
                most = f"below {bound}"
            case _Far():
                most = most if _is_large(value) else ""
    if typing.get_args(annotation)[0] is int and least.endswith(" or more") and most.startswith("at most "):
        return f"in {least.removesuffix(' or more')}..{most.removeprefix('at most ')}"
    return " and ".join(filter(None, (least, most)))
