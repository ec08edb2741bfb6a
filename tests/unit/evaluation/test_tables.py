"""Rows and Markdown of results."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from m2_encoder.evaluation.metrics import retrieval_metrics
from m2_encoder.evaluation.tables import CellTable, format_percent, markdown_table, print_cells, tabulate


def example() -> dict[str, dict[str, dict[str, float]]]:
    perfect = retrieval_metrics(torch.eye(20), torch.arange(20), torch.eye(20), torch.arange(20))
    shifted = retrieval_metrics(torch.eye(20), torch.arange(20), torch.eye(20).roll(1, 0), torch.arange(20))
    return {"easy": {"zh": perfect, "en": shifted}, "hard": {"zh": shifted, "en": perfect}}


def test_chance_closes_every_split() -> None:
    table = tabulate(example())
    assert [list(languages) for languages in table.values()] == [["zh", "en", "chance"]] * 2
    assert table["easy"]["zh"]["t2i_r@1"] == 100
    assert table["easy"]["en"]["t2i_r@1"] == 0
    assert table["easy"]["chance"]["t2i_r@5"] == pytest.approx(25)
    assert table["easy"]["chance"]["mean_recall"] == pytest.approx((5 + 25 + 50) / 3)


def test_markdown_has_a_cell_for_every_column() -> None:
    lines = markdown_table(example(), {"easy": "training set", "hard": "hard"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {10}
    assert cells[2][:4] == ["training set", "20", "zh", "100.0"]
    assert cells[3][:3] == ["", "", "en"]
    assert cells[4][2:4] == ["*chance*", "*5.0*"]
    assert cells[5][0] == "hard"


@pytest.mark.parametrize(("value", "text"), [(0, "0.00"), (0.067, "0.07"), (1, "1.0"), (99.96, "100.0")])
def test_small_numbers_keep_two_decimals(value: float, text: str) -> None:
    assert format_percent(value) == text


def test_no_cell_is_cut_however_narrow_the_terminal() -> None:
    rows = [["a set of mine", f"{n}.{n}%", "18.6–30.6", "1,234,567"] for n in range(3)]
    table = CellTable("Cells", ["set", "a long heading", "95 %", "n"], rows)
    for console in (Console(width=20, force_terminal=True, color_system=None), Console(width=20)):
        with console.capture() as shown:
            print_cells(console, table)
        for row in rows:
            assert all(cell in shown.get() for cell in row[1:]), shown.get()
