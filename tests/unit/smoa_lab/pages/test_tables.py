from __future__ import annotations

import pytest

from smoa_lab.pages.tables import Cell, Table, score_table

TABLE = Table(["name", "rank"], [["q_proj", 8], [Cell("v_proj", value=1), Cell("3 4", links={"3": "#3", "4": "#4"})]])


def test_one_table_is_shown_in_markdown_on_a_page_and_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert TABLE.markdown() == "| name | rank |\n|---|--:|\n| q_proj | 8 |\n| v_proj | 3 4 |"
    assert TABLE.markdown(["--:"] * 2).splitlines()[1] == "|--:|--:|"
    page = TABLE.__html__()
    assert "<tr><td>q_proj</td><td>8</td></tr>" in page
    assert '<tr><td data-value="1">v_proj</td><td><a href="#3">3</a> <a href="#4">4</a></td></tr>' in page
    assert TABLE.without("rank").markdown() == "| name |\n|---|\n| q_proj |\n| v_proj |"
    Table(["task", "n"], [["a", 100], ["bcdefg", 1]]).print()
    assert capsys.readouterr().out == "task      n\na       100\nbcdefg    1\n"
    TABLE.print()
    assert capsys.readouterr().out.split() == ["name", "rank", "q_proj", "8", "v_proj", "3", "4"]


def test_a_table_in_a_pipe_has_whole_cells_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    long, brackets = "model.layers." * 30, "[bold]not markup[/bold]"
    Table([brackets, "n"], [[long, brackets]]).print()
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "[bold]not"
    assert row.split("  ") == [long, brackets]


def test_a_table_wider_than_the_terminal_is_wrapped_and_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    Table(["layer", "rank"], [["abcdefghij" * 5, 4]]).print()
    printed = capsys.readouterr().out
    assert "abcdefghij" * 5 in "".join(line.split()[0] for line in printed.splitlines()[1:] if line.strip())


def test_scores_have_a_row_for_each_task_and_stage_with_their_errors() -> None:
    scores = {"questions": 1200, "accuracy": 0.25, "accuracy_stderr": 0.0123, "majority": None}
    table = score_table({"before": {"piqa": scores, "all": {**scores, "accuracy": None}}})
    assert table.header == ["task", "training", "held-out questions", "accuracy"]
    assert table.rows == [["piqa", "before", "1,200", "0.250 ± 0.012"], ["all", "before", "1,200", "–"]]


def test_scores_of_rows_have_no_column_of_tasks() -> None:
    table = score_table({stage: {"all": {"rows": 6, "loss": 1.5}} for stage in ("before", "after")})
    assert table.header == ["training", "held-out rows", "loss"]
    assert table.rows == [["before", "6", "1.500"], ["after", "6", "1.500"]]
    assert score_table({}).rows == []
