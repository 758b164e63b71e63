"""Lays the script that draws charts beside the pages that need it: Vega, as the package vl-convert has it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from smoa.atomic import write_whole

SCRIPT = "charts.js"


def vega_lite_version() -> str:
    """The version of Vega-Lite that charts are written in, as vl-convert names it."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def lay_script(folder: Path) -> None:
    """Write the script into ``folder``, unless it is there already."""
    file, text = folder / SCRIPT, script()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_whole(file, text)


@cache
def script() -> str:
    """The script: it needs nothing else, neither at this moment nor in the browser."""
    import vl_convert

    drawing = (files("smoa_lab.drawing") / SCRIPT).read_text(encoding="utf-8")
    bundled: str = vl_convert.javascript_bundle(drawing, vl_version=vega_lite_version())
    return bundled
