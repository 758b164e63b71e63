"""``smoa run``: runs another tool, or a script, in a process where SMoA is registered with PEFT."""

from __future__ import annotations

import importlib
import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import failed

# All words after the tool's name are passed to the tool, `--help` too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    context: typer.Context,
    tool: Annotated[
        str, typer.Argument(help="Command of an installed Python package, such as lm_eval, or a .py file.")
    ],
) -> None:
    """Run another tool on SMoA adapters, e.g. `smoa run lm_eval --model hf …`; its options follow its name."""
    commands = list(entry_points(group="console_scripts", name=tool))
    is_script = tool.endswith(".py")
    if is_script and not Path(tool).is_file():
        raise failed(f"{tool}: no such file")
    if not is_script and not commands:
        raise failed(f"{tool!r} is not a command of the packages in {sys.prefix}; install it there, or name a .py file")
    importlib.import_module("smoa")  # registers the method with PEFT
    sys.argv = [tool, *context.args]
    if is_script:
        sys.path.insert(0, str(Path(tool).resolve().parent))  # as Python does for a script
        runpy.run_path(tool, run_name="__main__")
    else:
        sys.exit(commands[0].load()())
