from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.text import Text

import smoa
from smoa_lab.cli.main import app

HELP_WITHOUT_TORCH = """
import sys
from smoa_lab.__main__ import main
sys.argv = ["smoa", *{arguments}]
try:
    main()
finally:
    print("heavy:", sorted({{"torch", "transformers", "peft", "smoa"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "heavy: []" in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH.format(arguments=["--version"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"smoa {smoa.__version__}\nheavy: []\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, "-m", "smoa_lab", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trian" in done.stderr


def commands(command: Any) -> Iterator[Any]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from commands(one)


def test_help_texts_are_shown_in_full() -> None:
    """Typer takes them for rich's markup, in which a word in brackets is a style."""
    found = list(commands(typer.main.get_command(app)))
    assert len(found) > 10
    for command in found:
        for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
            assert Text.from_markup(text or "").plain == (text or "")
