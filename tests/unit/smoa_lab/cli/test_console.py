import pytest
import typer

from smoa.errors import DataError
from smoa_lab.cli.console import reporting


def test_an_error_of_ours_is_one_line_on_stderr_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise DataError("piqa: no such column")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: piqa: no such column\n"


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert "resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "run/checkpoint-2/optimizer.pt"),
        OSError(27, "File too large", "run/adapter/README.md"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 16256 vs 16144"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_whoever_finds_it_full(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting():
        raise error
    assert ended.value.exit_code == 1
    told = capsys.readouterr().err
    remedy = "make room, or raise ulimit -f, and run the same command again"
    assert told == f"error: the disk is full ({error}); {remedy}\n"
