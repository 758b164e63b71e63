"""`smoa run`, in processes of its own: what it is for is that smoa was imported before the tool starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import beside
from peft import PeftType
print(PeftType("SMOA").value, beside.VALUE, *sys.argv[1:], __name__)
sys.exit(3)
"""


def smoa_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smoa", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_script_runs_as_python_runs_it_with_smoa_known_to_peft(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 42\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = smoa_run(str(tmp_path / "script.py"), "--help", "-x", "1")
    assert done.stdout == "SMOA 42 --help -x 1 __main__\n", done.stderr
    assert done.returncode == 3


def test_only_the_tool_prints(tmp_path: Path) -> None:
    (tmp_path / "silent.py").touch()
    command = [sys.executable, "-m", "smoa_lab", "run", str(tmp_path / "silent.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_command_gets_its_own_options() -> None:
    done = smoa_run("accelerate", "env", "--help")
    assert done.returncode == 0, done.stderr
    assert "--config_file" in done.stdout


def test_what_is_neither_command_nor_script_is_named() -> None:
    for tool, rule in {"no-such-tool": "is not a command", "nowhere.py": "no such file"}.items():
        done = smoa_run(tool)
        assert done.returncode == 1
        assert tool in done.stderr
        assert rule in done.stderr
