from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from m2_encoder.config.help import read_values, render_help

COMMAND = SimpleNamespace(name="m2-tool", summary="Test things.", examples=("m2-tool size=2",), notes=("A note.",))


def test_values_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tool.yaml"
    path.write_text(
        "# A comment of its own.\n"
        "defaults:\n  - kind: one\n  - _self_\n"
        "size: 3 # in metres\n"
        "run:\n  name: ???\n  deep: { a: 1, b: 2 } # two\n"
        "colours: [red, blue]\n",
        encoding="utf-8",
    )
    assert read_values(path) == [
        ("size=3", "in metres"),
        ("run.name=???", ""),
        ("run.deep={ a: 1, b: 2 }", "two"),
        ("colours=[red, blue]", ""),
    ]


def test_one_line_defaults_are_no_value(tmp_path: Path) -> None:
    path = tmp_path / "tool.yaml"
    path.write_text("defaults: [base, _self_]\nsize: 3\n", encoding="utf-8")
    assert read_values(path) == [("size=3", "")]


def test_the_default_of_a_group_is_marked() -> None:
    groups = {"kind": ["one", "two"], "experiment": ["long"]}
    lines = render_help(COMMAND, groups, chosen={"kind": ["two"]}, values=[]).splitlines()
    assert "  kind        one | two*" in lines
    assert "  experiment  long" in lines
    assert not any(line.startswith("Values") for line in lines)


def test_long_meanings_are_folded_in_their_column() -> None:
    text = render_help(COMMAND, {}, chosen={}, values=[("size=3", "word " * 60)])
    folded = [line for line in text.splitlines() if "word" in line]
    assert len(folded) > 1
    assert all(len(line) <= 116 for line in folded)
    assert {line.index("word") for line in folded} == {len("  size=3  ")}
    assert "Groups" not in text


@pytest.mark.parametrize("name", ["data_emoji", "embed", "evaluate", "export", "plan"])
def test_every_value_of_the_commands_is_explained(name: str, repo_root: Path) -> None:
    values = read_values(repo_root / "conf" / "commands" / f"{name}.yaml")
    assert values
    assert [value for value, meaning in values if not meaning] == []
