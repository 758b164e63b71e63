"""Saves charts as PNG and SVG files, drawn here and not in a browser."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

from smoa.atomic import write_whole
from smoa_lab.drawing.chart_script import vega_lite_version
from smoa_lab.drawing.look import specification

SCALE = 2
COLORS = 192


def save_pictures(chart: Any, png: Path) -> None:
    """Write the chart as ``png`` and, with the same name, as an SVG."""
    import vl_convert

    save_picture(chart, png)
    svg = vl_convert.vegalite_to_svg(_on_white(chart), vl_version=vega_lite_version())
    write_whole(png.with_suffix(".svg"), _renumbered(svg))


def save_picture(chart: Any, file: Path) -> None:
    """Write the chart as a PNG, at twice its size, in few colors, which takes half the bytes."""
    import vl_convert
    from PIL import Image

    drawn = vl_convert.vegalite_to_png(_on_white(chart), vl_version=vega_lite_version(), scale=SCALE)
    compact = BytesIO()
    Image.open(BytesIO(drawn)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        compact, format="png", optimize=True
    )
    write_whole(file, compact.getvalue())


def _renumbered(svg: str) -> str:
    """``svg`` with its clip paths counted from 0: Vega counts them on over all charts of a process."""
    names: dict[str, str] = {}
    return re.sub(r'(?<=[#"])clip\d+(?=[")])', lambda found: names.setdefault(found[0], f"clip{len(names)}"), svg)


def _on_white(chart: Any) -> dict[str, Any]:
    return {**specification(chart), "background": "white", "padding": 10}
