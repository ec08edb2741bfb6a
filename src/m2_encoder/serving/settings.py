"""Values in bodies and addresses, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from m2_encoder.errors import abridge
from m2_encoder.serving.refusals import invalid


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses keys that nothing reads, because they are misspelt or of another version.

    Raises:
        Refusal: naming the first of them and what is allowed.
    """
    for key in values:
        if key not in known:
            raise invalid(f"{abridge(str(key), 60)} is unknown here; known: {', '.join(known)}")


def read_text(values: Mapping[str, Any], key: str) -> str:
    """A text that is not blank.

    Raises:
        Refusal: if it is missing or anything else.
    """
    value = values.get(key)
    if not isinstance(value, str):
        raise invalid(f"{key} must be a text" if key in values else f"{key} is missing; give a text")
    if not value.strip():
        raise invalid(f"{key} is empty")
    return value


def read_number(values: Mapping[str, Any], key: str, default: int, *, least: int, most: int) -> int:
    """A whole number, as JSON has it or as digits.

    Raises:
        Refusal: if it is anything else, or out of bounds.
    """
    value = values.get(key, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(f"{key}={abridge(str(value), 40)}: must be a whole number, {least} to {most:,}")
    return value
