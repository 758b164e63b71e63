"""Runs the ``smoa`` command in a process where some packages cannot be found, as if they were not installed.

python -m tests.support.without_packages matplotlib,datasets train run.yaml
"""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Without(PathFinder):
    """Finds what Python finds on its path, but for the blocked packages."""

    blocked: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """None for a blocked package, as for one that is not installed."""
        if fullname in cls.blocked or fullname.partition(".")[0] in cls.blocked:
            return None
        return super().find_spec(fullname, path, target)  # type: ignore[arg-type]


def smoa_without(packages: set[str], *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """What `smoa` with these arguments, and lines in its pipe, does without the packages (names of modules)."""
    command = [sys.executable, "-m", "tests.support.without_packages", ",".join(sorted(packages)), *arguments]
    return subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    Without.blocked = frozenset(filter(None, sys.argv[1].split(",")))
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in Without.blocked]:
        del sys.modules[name]
    sys.argv = ["smoa", *sys.argv[2:]]
    from smoa_lab.__main__ import main

    main()
