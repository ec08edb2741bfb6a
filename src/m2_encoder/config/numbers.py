"""Arithmetic in configurations: `${div:24000,${data.global_batch_size}}` is how many batches 24,000 samples fill."""

from __future__ import annotations

import math

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Makes `${div:A,B}` and `${mul:A,B}` known to OmegaConf."""
    OmegaConf.register_new_resolver("div", divide, replace=True)
    OmegaConf.register_new_resolver("mul", multiply, replace=True)


def divide(total: object, *parts: object) -> int:
    """A whole number divided by others, rounded down.

    >>> divide(24000, 128)
    187

    Raises:
        ValueError: if a value is no whole number above 0.
    """
    numbers = _whole("div", total, *parts)
    return numbers[0] // math.prod(numbers[1:])


def multiply(*factors: object) -> int:
    """The product of whole numbers.

    Raises:
        ValueError: if a value is no whole number above 0.
    """
    return math.prod(_whole("mul", *factors))


def _whole(name: str, *values: object) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{_text(name, values)}: {value!r} is no whole number above 0")
    if len(values) < 2:
        raise ValueError(f"{_text(name, values)}: needs two whole numbers, as in ${{{name}:A,B}}")
    return [value for value in values if isinstance(value, int)]


def _text(name: str, values: object) -> str:
    assert isinstance(values, list | tuple)
    return f"${{{name}:{','.join(map(str, values))}}}"
