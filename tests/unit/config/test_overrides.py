"""Overrides as users type them reach the commands unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.config.overrides import parse_override, quote_unreadable

# Backslashes and commas have a meaning outside of quotes.
PATHS = st.text(st.sampled_from("ab/.=\"'()[]{}:猫é%~+-") | st.characters(exclude_categories=["C"]), min_size=1)


@given(PATHS)
def test_any_path_survives_hydra(path: str) -> None:
    if path.startswith(("'", '"', "[", "{", "${")) or "," in path or "\\" in path:
        return
    override = parse_override(quote_unreadable(f"images={path}"))
    assert override is not None
    value = override.value()
    # What Hydra reads itself loses spaces at its ends; what is put into quotes keeps them.
    whole = (path, path.strip(" "))
    assert value in whole if isinstance(value, str) else parse_override(f"images={path}") is not None


@pytest.mark.parametrize(
    "line", ["x=null", "x=???", "x=", 'x="a b"', "x=/a/b", "x=[1", "x={a", "x='a", "x=${a", "x", "~x"]
)
def test_what_can_be_read_and_what_begins_like_syntax_stays(line: str) -> None:
    assert quote_unreadable(line) == line


@pytest.mark.parametrize(
    ("line", "quoted"),
    [
        ("+data.sources.a.shards=/d/{000..099}.tar", '+data.sources.a.shards="/d/{000..099}.tar"'),
        ("output=a=b,c", 'output="a=b,c"'),
        ('output=(a) "b"', 'output="(a) \\"b\\""'),
        ("output=a#\\", 'output="a#\\\\"'),
    ],
)
def test_other_values_get_quotes(line: str, quoted: str) -> None:
    assert quote_unreadable(line) == quoted


def test_commas_separate_values_of_a_sweep() -> None:
    assert quote_unreadable("x=a=b,c", multirun=True) == "x=a=b,c"
    assert quote_unreadable("x=a=b", multirun=True) == 'x="a=b"'


def test_a_path_that_exists_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert quote_unreadable("source=a,b") == 'source="a,b"'
    assert quote_unreadable(f"source={tmp_path}/a,b") == f'source="{tmp_path}/a,b"'
    assert quote_unreadable("source=a,c") == "source=a,c"
    assert quote_unreadable("source=a,b", multirun=True) == "source=a,b"
