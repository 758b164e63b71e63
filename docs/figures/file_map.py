"""Writes the file map of docs/design.md from the first line of every module.

Run by `make docs`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "design.md"
MARKERS = "<!-- file map: written by docs/figures/file_map.py -->\n", "<!-- end of the file map -->\n"


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


def file_map() -> str:
    """The map as a Markdown code block."""
    listed = [entry for package in ("smoa", "smoa_lab") for entry in entries(ROOT / "src" / package)]
    width = max(len(name) for name, _ in listed)
    return "\n".join(["```text", *(f"{name.ljust(width)}  {text}" for name, text in listed), "```", ""])


def page() -> str:
    """docs/design.md with the current map."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    return before + MARKERS[0] + file_map() + MARKERS[1] + rest.partition(MARKERS[1])[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
