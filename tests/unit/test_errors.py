from __future__ import annotations

import pytest

from m2_encoder.config.problems import format_problem
from m2_encoder.errors import MAX_ENTRIES, MAX_LINE, Problem, abridge, abridge_list


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat", "a cat"),
        ("[/INST] :cat: 一只猫\u3000👩‍🚀", "[/INST] :cat: 一只猫\u3000👩‍🚀"),
        ("a\nb\x1b[31m\udcff", "a\\nb\\x1b[31m\\udcff"),
        ("photo\u202egpj.exe\u2028next", "photo\\u202egpj.exe\\u2028next"),
        ("x" * 501, "x" * 298 + " … " + "x" * 199),
    ],
)
def test_a_line_is_short_and_printable(text: str, shown: str) -> None:
    assert abridge(text) == shown


def test_megabytes_are_cut_and_both_ends_stay() -> None:
    shown = abridge("key=" + "\n" * 10**7 + "; the fix")
    assert len(shown) <= MAX_LINE
    assert shown.startswith("key=\\n")
    assert shown.endswith("; the fix")


def test_a_list_is_short() -> None:
    lines = abridge_list([f"{n}" for n in range(10_000)])
    assert (len(lines), lines[0], lines[-1]) == (MAX_ENTRIES, "0", "… and 9,981 more")
    assert abridge_list(["a"] * MAX_ENTRIES) == ["a"] * MAX_ENTRIES


def test_a_problem_keeps_its_rule_whatever_the_value() -> None:
    line = format_problem(Problem("a.b", ["x" * 100] * 10_000, "must be short", "write a.b=x"))
    assert len(line) <= MAX_LINE
    assert line.startswith("a.b=[xxx")
    assert line.endswith(": must be short; write a.b=x")
