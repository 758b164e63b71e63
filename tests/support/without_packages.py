"""Runs ``smoa`` where some packages cannot be found, as if they were not installed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder

import pytest


class Without(PathFinder):
    """Finds what Python finds on its path, but for the blocked packages."""

    blocked: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """None for a blocked package, as for one that is not installed."""
        return None if _top(fullname) in cls.blocked else super().find_spec(fullname, path, target)  # type: ignore[arg-type]


def _top(module: str) -> str:
    return module.partition(".")[0]


@contextmanager
def command(words: Sequence[str], *packages: str) -> Iterator[None]:
    """`smoa` is called with these words, and imports its lab anew, without these packages."""
    blocked = frozenset(packages)
    hidden = {name: module for name, module in sys.modules.items() if _top(name) in blocked | {"smoa_lab"}}
    for name in hidden:
        del sys.modules[name]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Without, "blocked", blocked)
            finders = [Without if finder is PathFinder else finder for finder in sys.meta_path]
            patch.setattr(sys, "meta_path", finders)
            patch.setattr(sys, "argv", ["smoa", *words])
            yield
    finally:
        for name in [name for name in sys.modules if _top(name) == "smoa_lab"]:
            del sys.modules[name]
        sys.modules.update(hidden)
