"""What mkdocs does as well: formulas become MathML, and links to the repository's files lead to copies in the site.

In the repository a page links to `../configs/demo.yaml`, as it must to work there. The site has no such file above it,
so a copy goes to `repository/configs/demo.yaml.txt` (text that a browser shows, not saves) and the link with it.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "studies")]

import stored  # noqa: E402

LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)")
OF_STUDIES = (".md", ".json", ".gz", ".png")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
SHOWN_AS_THEY_ARE = (".json", ".png", ".svg", ".html")


def on_files(files: Files, config: Any) -> Files:
    """Add the report of every study, and a copy of every other file of the repository, outside docs/, that a page links
    to."""
    for folder in (*stored.folders(), *stored.compared()):
        for file in sorted(folder.iterdir()):
            if file.suffix in OF_STUDIES:
                files.append(File.generated(config, f"studies/{folder.name}/{file.name}", abs_src_path=str(file)))
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            path = repository_path(page.src_uri, target)
            if path is not None and files.get_file_from_path(copy_of(path)) is None:
                source = ROOT / path
                if source.is_dir():
                    listing = "\n".join(sorted(file.name for file in source.iterdir() if file.name[0] not in "._"))
                    files.append(File.generated(config, copy_of(path), content=listing + "\n"))
                else:
                    files.append(File.generated(config, copy_of(path), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the copies."""

    def replaced(link: re.Match[str]) -> str:
        path = repository_path(page.file.src_uri, link[1])
        return link[1] if path is None else posixpath.relpath(copy_of(path), posixpath.dirname(page.file.src_uri))

    return LINK.sub(replaced, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas as MathML."""

    def drawn(formula: re.Match[str]) -> str:
        math: str = convert(html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline")
        return math

    return FORMULA.sub(drawn, content)


def repository_path(page: str, target: str) -> str | None:
    """Path in the repository of what `target` on `page` leads to; None inside docs/ or where nothing is."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if not path.startswith("../"):
        return None
    inside = path.removeprefix("../")
    return inside if (ROOT / inside).exists() else None


def copy_of(path: str) -> str:
    """Where the site keeps the copy: files of studies under their own names."""
    if path.startswith("studies/") and path.count("/") > 1 and path.endswith(OF_STUDIES):
        return path
    if (ROOT / path).is_dir():
        return f"repository/{path}/files.txt"
    return f"repository/{path}" + ("" if path.endswith(SHOWN_AS_THEY_ARE) else ".txt")
