from __future__ import annotations

import subprocess
import sys

import pytest

HELP_WITHOUT_TORCH = """
import sys
from smoa_lab.cli.main import app
try:
    app({arguments})
finally:
    print("heavy:", sorted({{"torch", "transformers", "peft", "smoa"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "heavy: []" in done.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smoa_lab.cli.main", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "trian" in done.stderr
