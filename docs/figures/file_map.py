"""Prints the file map: the first line of every module. docs/site_hooks.py puts it into the built design page."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def entries(folder: Path, depth: int = 0) -> list[tuple[str, str]]:
    """(indented name, first line) of a package, its modules, and the packages in it."""
    indent = "  " * depth
    found = [(f"{indent}{folder.name}/", first_line(folder / "__init__.py"))]
    modules = (file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py")
    found += [(f"{indent}  {file.name}", first_line(file)) for file in modules]
    packages = (inner for inner in sorted(folder.iterdir()) if (inner / "__init__.py").is_file())
    return found + [entry for package in packages for entry in entries(package, depth + 1)]


def first_line(file: Path) -> str:
    """The first sentence of a module's docstring, up to the end of its first line.

    Raises:
        ValueError: the module has no docstring.
    """
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file}: has no docstring; add one, its first line goes into the file map")
    return re.sub(r"(\. .*|[.:]|\. \(.*)$", "", text.splitlines()[0])


@cache  # which the site's hook asks for on every page
def file_map() -> str:
    """The map as a Markdown code block."""
    listed = [entry for package in ("smoa", "smoa_lab") for entry in entries(ROOT / "src" / package)]
    width = max(len(name) for name, _ in listed)
    return "\n".join(["```text", *(f"{name.ljust(width)}  {text}" for name, text in listed), "```", ""])


if __name__ == "__main__":
    print(file_map())
