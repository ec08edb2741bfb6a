"""What is wrong with a configuration, as data, and the one line that users read of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from m2_encoder.errors import MAX_LINE, NOTHING, Problem, UserError, abridge


class Unset:
    """Stands for a value that is missing or unresolvable; that is reported once, other checks skip it."""

    def __repr__(self) -> str:
        return "???"


UNSET: Final = Unset()


def format_problem(problem: Problem) -> str:
    """The line `key=value: rule; fix`, of at most `MAX_LINE` characters."""
    given = problem.key if problem.value is NOTHING else f"{problem.key}={show(problem.value)}"
    said = "; ".join(filter(None, (problem.rule, problem.fix)))
    return abridge(": ".join(filter(None, (abridge(given, MAX_LINE // 2) if said else given, said))))


def refuse_all(problems: Sequence[Problem]) -> None:
    """Raises everything that is wrong, if anything is.

    Raises:
        UserError: with all problems.
    """
    if problems:
        raise UserError("; ".join(map(format_problem, problems)), problems=problems)


def find_problems(error: UserError) -> list[Problem]:
    """Everything that an error says is wrong."""
    return list(error.problems) or [Problem(error.key or "", error.value, " ".join(error.text.split()))]


def show(value: Any) -> str:
    """A value as one would type it; strings that look like something else are quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (not value or re.fullmatch(r"[-+.\deE]+|true|false|null|nan|inf", value)):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {show(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"[{', '.join(show(item) for item in value)}]"
    return str(value)


def flatten(error: BaseException) -> str:
    """The message of an exception on one line."""
    text = " ".join(str(error).split())
    return text.partition(" full_key:")[0]  # the key is in every message already


def nearest(name: str, known: Collection[str]) -> str:
    """A hint with the most similar known names, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
