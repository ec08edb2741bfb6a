"""What spreadsheets and pandas make of values: "nan" for nothing, 12345.0 for a whole number."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from m2_encoder.data.shards.index import IMAGE_EXTENSIONS

# As pandas and databases write it; "null" and "None" could be captions, but are not.
_NOTHING = frozenset({"", "nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "#N/A", "NaT", "\\N"})
_WHOLE = re.compile(r"(-?\d+)\.0+")


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: null, an empty text, NaN, and what pandas and databases write for it.

    >>> [is_missing(value) for value in (None, "", float("nan"), "nan", "None", "Nan bread", 0)]
    [True, True, True, True, True, False, False]
    """
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip() in _NOTHING)


def plain_number(value: Any) -> Any:
    """A whole number as one types it, where pandas made it a float; other values as they are.

    >>> plain_number(12345.0), plain_number("12345.0"), plain_number("1.50"), plain_number("a.0")
    (12345, '12345', '1.50', 'a.0')
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value.strip())):
        return found[1]
    return value


def find_numbered(number: str, root: str) -> str | None:
    """File name of a picture in `root` that is called by a number; None if there is none."""
    names = (f"{number}.{extension}" for extension in IMAGE_EXTENSIONS)
    return next((name for name in names if os.path.isfile(os.path.join(root, name))), None)
