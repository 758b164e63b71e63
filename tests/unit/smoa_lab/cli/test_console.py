from __future__ import annotations

import pytest
import typer

from smoa.errors import DataError
from smoa_lab.cli.console import print_table, reporting, score, size


def test_an_error_of_ours_is_one_line_on_stderr_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise DataError("piqa: no such column")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: piqa: no such column\n"


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert "resumes" in capsys.readouterr().err


def test_numbers_stand_to_the_right_and_names_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["task", "n"], [["a", "100"], ["bcdefg", "1"]])
    assert capsys.readouterr().out == "task      n\na       100\nbcdefg    1\n"


def test_scores_carry_their_error_and_missing_ones_a_dash() -> None:
    assert score(0.25, 0.0123) == "0.250 ± 0.012"
    assert score(None) == "–"


def test_bytes_are_written_for_people() -> None:
    assert [size(n) for n in (12, 1234, 5_600_000)] == ["12 B", "1.2 kB", "5.6 MB"]
