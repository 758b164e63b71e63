"""Runs ``smoa`` commands in a process where some packages cannot be found, as if they were not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import ModuleSpec, PathFinder
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    output: str
    errors: str


class Without(PathFinder):
    """Finds what Python finds on its path, but for the blocked packages."""

    blocked: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """None for a blocked package, as for one that is not installed."""
        if fullname in cls.blocked or fullname.partition(".")[0] in cls.blocked:
            return None
        return super().find_spec(fullname, path, target)  # type: ignore[arg-type]


def smoa_without(packages: set[str], *commands: Sequence[str]) -> list[Done]:
    """What `smoa` does with each list of arguments, one after the other in one process without the packages (names of
    modules); whoever chats says hello."""
    given = json.dumps([sorted(packages), [list(command) for command in commands]])
    process = [sys.executable, "-m", "tests.support.without_packages"]
    done = subprocess.run(process, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Done(*found) for found in json.loads(done.stdout)]


def _run(arguments: list[str]) -> Done:
    from smoa_lab.__main__ import main

    sys.argv, sys.stdin = ["smoa", *arguments], StringIO("hello\n")
    code: object = 0
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # Python prints it
                errors.write(code + "\n")
    return Done(int(code is not None and code != 0), output.getvalue(), errors.getvalue())


if __name__ == "__main__":
    packages, commands = json.load(sys.stdin)
    Without.blocked = frozenset(packages)
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in Without.blocked]:
        del sys.modules[name]
    sys.stdout.write(json.dumps([_run(command) for command in commands]))
