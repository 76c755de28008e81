"""Tables align in a terminal, and escape in HTML."""

from __future__ import annotations

import torch
from torch import nn

from mlframework.quantization import QATConfig, preparation_report, prepare
from mlframework.quantization.tables import html_table, text_table


def test_columns_align() -> None:
    lines = text_table(("name", "value"), [("a", "1.5"), ("longer", "10.25")], numbers=[1]).splitlines()
    assert lines == ["name    value", "a         1.5", "longer  10.25"]


def test_nothing_of_a_cell_is_markup() -> None:
    table = html_table(("<b>",), [('"&<script>',)], notes=["<i>"])
    assert "<script>" not in table
    assert "<b>" not in table
    assert "<i>" not in table
    assert "&lt;script&gt;" in table


def test_numbers_are_aligned_to_the_right() -> None:
    assert html_table(("a", "b"), [("x", "1")], numbers=[1]).count("text-align:right") == 2


def test_a_preparation_report_is_a_table_in_a_notebook() -> None:
    page = preparation_report(prepare(nn.Linear(4, 2), QATConfig(), (torch.randn(1, 4),)))._repr_html_()
    assert page.startswith("<table>")
    assert "<td>Linear</td>" in page
