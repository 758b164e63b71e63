from __future__ import annotations

import pytest

from smoa_lab.pages.tables import Cell, Table

TABLE = Table(["name", "rank"], [["q_proj", 8], [Cell("v_proj", value=1), Cell("3 4", links={"3": "#3", "4": "#4"})]])


def test_one_table_is_shown_in_markdown_on_a_page_and_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert TABLE.markdown() == "| name | rank |\n|---|--:|\n| q_proj | 8 |\n| v_proj | 3 4 |"
    assert TABLE.markdown(["--:"] * 2).splitlines()[1] == "|--:|--:|"
    page = TABLE.__html__()
    assert "<tr><td>q_proj</td><td>8</td></tr>" in page
    assert '<tr><td data-value="1">v_proj</td><td><a href="#3">3</a> <a href="#4">4</a></td></tr>' in page
    TABLE.print()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "rank"],
        ["q_proj", "8"],
        ["v_proj", "3", "4"],
    ]


def test_a_column_is_left_out() -> None:
    assert TABLE.without("rank").markdown() == "| name |\n|---|\n| q_proj |\n| v_proj |"
