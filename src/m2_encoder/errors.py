"""Errors that a user can cause and mend.

Everything that a user controls (a configuration value, a file, an argument) fails with one of these: one message that
names what was given, what is allowed and how to mend it. Commands print the message without a traceback and exit 2.

An error is data until it is printed: `key` names the argument that is wrong, as the function that raises it calls it.
Whoever knows where the argument came from puts that in front with `under`; only the command line makes a line of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self


class Problem(NamedTuple):
    """One thing to mend.

    Attributes:
        key: dotted name of what is wrong; "" if no single value is.
        value: what was given; `NOTHING` where a value says nothing, such as for a key that is missing.
        rule: what it must be.
        fix: the way out; "" where the rule says it.
    """

    key: str
    value: Any
    rule: str
    fix: str = ""


class _Nothing:
    """The type of `NOTHING`."""

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"


NOTHING = _Nothing()
"""In place of a value that there is not, or that nobody needs to see."""


class UserError(ValueError):
    """Input that cannot be used.

    Args:
        text: the rule and the fix; it does not repeat `key` and `value`.
        key: the argument that is wrong, as the function that raises calls it; None if no single argument is.
        value: what it is; left out of the message if not given.
        problems: several things that are wrong at once; `text` is then a summary of them.
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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._restore, (self.text, dict(self.__dict__))

    @classmethod
    def _restore(cls, text: str, state: dict[str, Any]) -> Self:
        error = cls(text)
        error.__dict__.update(state)
        return error

    def under(self, prefix: str) -> Self:
        """The same error where the argument is a part of something larger: `lr` under `optimizer` is `optimizer.lr`.

        Args:
            prefix: dotted; an error without a key gets it as its key.
        """
        error = copy.copy(self)
        error.key = prefix if self.key is None else f"{prefix}.{self.key}"
        error.problems = tuple(each._replace(key=f"{prefix}.{each.key}".rstrip(".")) for each in self.problems)
        return error


class CheckpointError(UserError):
    """A checkpoint that is foreign, truncated, unsafe, or does not match the model."""


class NotGivenError(UserError):
    """Something that code hands over, such as a teacher, was not handed over yet."""


class ImageError(UserError):
    """An image that cannot be decoded; the message names the file and the reason."""
