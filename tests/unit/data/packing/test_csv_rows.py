from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.packing.csv_rows import read_rows

FIELD = st.text(st.sampled_from("ab猫 ,;\"\n\r'x"), max_size=8)


def _read(content: str, delimiter: str) -> list[tuple[str, ...]]:
    return list(read_rows(io.StringIO(content, newline=""), delimiter))


@given(
    rows=st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=6),
    delimiter=st.sampled_from(",\t"),
    everything=st.booleans(),
)
def test_what_a_csv_writer_wrote_is_read_as_it_was(
    rows: list[tuple[str, str, str]], delimiter: str, everything: bool
) -> None:
    rows = [("image", "caption", "id"), *rows]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL
    csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)
    assert _read(file.getvalue(), delimiter) == rows


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize(
    "caption", ['"Big', 'a 5" screen', '"Big" cat', 'screen 5"', '"', '""Big"', '"Big"" cat'], ids=range(7)
)
def test_marks_that_mean_nothing_cost_no_row(caption: str, delimiter: str) -> None:
    """Nothing but the row itself may change, wherever it stands and whatever comes behind it."""
    plain = [("image", "caption"), ("1.jpg", "one"), ("2.jpg", caption), ("3.jpg", "three"), ("4.jpg", "four")]
    content = "".join(f"{delimiter.join(row)}\n" for row in plain)
    assert _read(content, delimiter) == plain
    assert _read(content + f'5.jpg{delimiter}"fi""ve"\n', delimiter) == [*plain, ("5.jpg", 'fi"ve')]


def test_an_open_and_a_closing_mark_rows_apart_in_a_tsv() -> None:
    content = 'caption\timage\n"Big\t1.jpg\nmiddle\t2.jpg\nscreen 5"\t3.jpg\n'
    assert [row[1] for row in _read(content, "\t")] == ["image", "1.jpg", "2.jpg", "3.jpg"]


def test_blank_lines_and_rows_of_another_width() -> None:
    content = 'a,b\r\n\r\n1,2,3\r\n"x\r\ny",4\r\n5\r\n'
    assert _read(content, ",") == [("a", "b"), ("1", "2", "3"), ("x\r\ny", "4"), ("5",)]
    assert _read("", ",") == []
