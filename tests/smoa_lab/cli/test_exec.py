"""`smoa exec`: what it is for is that smoa was imported before the tool starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app

SCRIPT = """
import sys
import beside
from peft import PeftType
from smoa_lab.cli.main import app
print(PeftType("SMOA").value, beside.VALUE, *sys.argv[1:], __name__)
try:
    app(["merge", "nothing", "out"])
except SystemExit as ended:
    sys.exit(ended.code + 2)
"""


@pytest.mark.slow  # a process that imports everything
def test_a_script_runs_as_python_runs_it_with_smoa_known_to_peft_and_nothing_else_prints(tmp_path: Path) -> None:
    """Whatever other libraries warn of as they are imported; a command that fails prints one line."""
    (tmp_path / "beside.py").write_text("VALUE = 42\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "smoa_lab", "exec", str(tmp_path / "script.py"), "--help", "-x", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("SMOA 42 --help -x 1 __main__\n", 3)
    assert re.fullmatch(r"error: nothing: contains no adapter.*\n", done.stderr)


def test_a_command_gets_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command replaces
    done = CliRunner().invoke(app, ["exec", "accelerate", "env", "--help"])
    assert done.exit_code == 0, done.stderr
    assert "--config_file" in done.stdout


def test_what_is_neither_command_nor_script_is_named() -> None:
    for tool, rule in {"no-such-tool": "is not a command", "nowhere.py": "no such file"}.items():
        done = CliRunner().invoke(app, ["exec", tool])
        assert done.exit_code == 1
        assert tool in done.stderr
        assert rule in done.stderr


# the demo
