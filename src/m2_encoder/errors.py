"""Errors that users can cause and fix: by a configuration value, a file or an argument.

The message names what was given, what is allowed and how to fix it. Commands print it without a traceback and exit 2.
`key` names the wrong argument as in the signature of the function that raises; callers prefix it by `under`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_LINE: Final = 500
"""Characters of a line that a command prints, at most; users' names and values can have any length."""

MAX_ENTRIES: Final = 20
"""Lines of a list that a command prints, at most."""

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, ends or turns a line, or is half a character."""


def abridge(text: str, limit: int = MAX_LINE) -> str:
    """One line of at most `limit` characters: the middle of a longer one is left out, control characters are escaped.

    >>> abridge("0123456789" * 3, 20)
    '0123456789 … 3456789'
    """
    if len(text) > 2 * limit:  # what is far from both ends goes first: a name can have megabytes
        text = text[:limit] + text[-limit:]
    text = _CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], text)
    if len(text) <= limit:
        return text
    head = (limit - 3) * 3 // 5
    return f"{text[:head]} … {text[len(text) - (limit - 3 - head) :]}"


def abridge_list(lines: Sequence[str], limit: int = MAX_LINE) -> list[str]:
    """At most `MAX_ENTRIES` lines, each as `abridge` makes it; the last one says how many more there are."""
    if len(lines) <= MAX_ENTRIES:
        return [abridge(line, limit) for line in lines]
    shown = [abridge(line, limit) for line in lines[: MAX_ENTRIES - 1]]
    return [*shown, f"… and {len(lines) - len(shown):,} more"]


def name_some(names: Collection[str], most: int = 5, limit: int = 120) -> str:
    """The first few names, each of at most `limit` characters, and the number of the others.

    >>> name_some("abc", 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(abridge(name, limit) for name in islice(names, most)) + more


def in_one_line(error: BaseException) -> str:
    """An error of somebody else's code: its class, and its message on one line.

    >>> in_one_line(ValueError("no such", "file"))
    "ValueError: ('no such', 'file')"
    """
    return abridge(f"{type(error).__name__}: {' '.join(str(error).split())}", MAX_LINE // 2)


class Problem(NamedTuple):
    """One mistake of the user."""

    key: str  # dotted name of the wrong value; "" if no single value is wrong
    value: Any  # what was given; `NOTHING` to leave it out, such as for a missing key
    rule: str  # what it must be
    fix: str = ""  # "" if the rule says it


class _Nothing:
    """The type of `NOTHING`."""

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"


NOTHING = _Nothing()
"""In place of a value that is missing or not shown."""


class UserError(ValueError):
    """Input that cannot be used.

    Args:
        text: the rule and the fix, without `key` and `value`.
        key: the wrong argument; None if no single argument is wrong.
        value: the wrong value; left out of the message if not given.
        problems: several mistakes, of which `text` is then a summary.
    """

    def __init__(
        self, text: str, *, key: str | None = None, value: Any = NOTHING, problems: Sequence[Problem] = ()
    ) -> None:
        super().__init__(text)
        self.text = text
        self.key = key
        self.value = value
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if self.key is None:
            return self.text
        given = self.key if self.value is NOTHING else f"{self.key}={self.value}"
        return f"{given}: {self.text}"

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show in place of a traceback, as commands do."""
        return [f"{type(self).__name__}: {self}"]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._restore, (self.text, dict(self.__dict__))

    @classmethod
    def _restore(cls, text: str, state: dict[str, Any]) -> Self:
        error = cls(text)
        error.__dict__.update(state)
        return error

    def under(self, prefix: str) -> Self:
        """The same error with a prefixed key: `lr` under `optimizer` is `optimizer.lr`; the prefix if there is none."""
        error = copy.copy(self)
        error.key = prefix if self.key is None else f"{prefix}.{self.key}"
        error.problems = tuple(each._replace(key=f"{prefix}.{each.key}".rstrip(".")) for each in self.problems)
        return error


@contextmanager
def under(prefix: str) -> Iterator[None]:
    """Errors of the user inside get a prefixed key, as `UserError.under` has it."""
    try:
        yield
    except UserError as error:
        raise error.under(prefix) from error


class CheckpointError(UserError):
    """A checkpoint of another format, truncated, unsafe, or of another model."""


class DamagedError(CheckpointError):
    """A file that is cut, changed, empty or no checkpoint at all: another copy of it could be whole."""


class NotGivenError(UserError):
    """An object that code must pass, such as a teacher, is missing."""


class ImageError(UserError):
    """An image that cannot be decoded; the message names the file and the reason."""
