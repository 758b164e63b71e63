"""Saves charts as PNG files, drawn here and not in a browser."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from smoa.atomic import write_whole
from smoa_lab.drawing.chart_script import vega_lite_version
from smoa_lab.drawing.look import specification

SCALE = 2
COLORS = 192


def save_picture(chart: Any, file: Path) -> None:
    """Write the chart on white, at twice its size, in few colors, which takes half the bytes."""
    import vl_convert
    from PIL import Image

    drawn = vl_convert.vegalite_to_png(
        {**specification(chart), "background": "white", "padding": 10}, vl_version=vega_lite_version(), scale=SCALE
    )
    compact = BytesIO()
    Image.open(BytesIO(drawn)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        compact, format="png", optimize=True
    )
    write_whole(file, compact.getvalue())
