"""How every chart looks (one color for each method, lines that differ in gray too), and charts as PNG and SVG files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import altair as alt

from smoa.atomic import write_whole

PALETTE = {
    "smoa": "#0072b2",
    "melora": "#4bd2b4",
    "lora": "#d55e00",
    "rslora": "#f0a500",
    "dora": "#b45a87",
    "pissa": "#87a54b",
    "hira": "#a51eff",
    "gralora": "#f00fd2",
    "loha": "#5a96ff",
    "corda": "#60303c",
    "lora-reduced": "#782400",
    "adalora": "#c3c387",
    "osf": "#a5c3ff",
    "full": "#87785a",
}
"""Any two stay apart for readers without one kind of cones, and on light and dark paper."""

NAMES = {
    "smoa": "SMoA",
    "melora": "MELoRA",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "hira": "HiRA",
    "gralora": "GraLoRA",
    "loha": "LoHa",
    "corda": "CorDA",
    "lora-reduced": "LoRA without intruders",
    "adalora": "AdaLoRA",
    "osf": "OSF",
    "full": "full fine-tuning",
}
"""What pictures call the methods."""

MUTED = "#909498"
"""What is not in the foreground, and methods without a color of their own, which differ in their lines."""

INK = "currentColor"
"""Text and axes: the color of the page's text, black in a file."""

PAPER = "white"
"""The inside of hollow marks: the color of the page's paper, white in a file."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
"""The lines of several entries, in their order: they differ in gray too."""

WIDTH = 620
PANEL = 144
"""Pixels of a chart, and of a panel of several."""


def color_of(method: str) -> str:
    """The method's color."""
    return PALETTE.get(method, MUTED)


def dash_of(methods: Mapping[str, str]) -> dict[str, list[int]]:
    """The line of each entry: they differ in gray too."""
    return dict(zip(methods, cycle(DASHES), strict=False))


def colors(methods: Mapping[str, str], field: str = "entry", legend: bool = False) -> alt.Color:
    """The encoding of ``field``, whose values are the keys, by the color of each one's method."""
    scale = alt.Scale(domain=list(methods), range=[color_of(method) for method in methods.values()])
    return alt.Color(f"{field}:N", scale=scale, legend=_legend() if legend else None)


def dashes(methods: Mapping[str, str], field: str = "entry", legend: bool = False) -> alt.StrokeDash:
    """The encoding of ``field`` by line, to go with :func:`colors`, and in one legend with it."""
    lines = dash_of(methods)
    scale = alt.Scale(domain=list(lines), range=list(lines.values()))
    return alt.StrokeDash(f"{field}:N", scale=scale, legend=_legend() if legend else None)


def _legend() -> alt.Legend:
    return alt.Legend(
        title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2, symbolOpacity=1, symbolSize=300
    )


def tooltip(**formats: str) -> list[alt.Tooltip]:
    """What pointing at a mark shows: fields in the order given, each with the format of its number (empty for text)."""
    return [
        alt.Tooltip(f"{field}:{'Q' if form else 'N'}", title=field.replace("_", " "), format=form)
        for field, form in formats.items()
    ]


def values(rows: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as a chart takes them."""
    return alt.InlineData(values=[dict(row) for row in rows])


def specification(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, in this look."""
    axis = {"labelColor": INK, "titleColor": INK, "domainColor": MUTED, "tickColor": MUTED, "gridColor": MUTED}
    looks = {
        "background": "transparent",
        "font": "Arial, Helvetica, sans-serif",
        "axis": {**axis, "gridOpacity": 0.25, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12},
        "title": {
            "color": INK,
            "anchor": "start",
            "fontSize": 12,
            "offset": 4,
            "subtitleColor": INK,
            "subtitleFontSize": 11,
        },
        "text": {"color": INK, "fontSize": 11},
        "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
        "header": {"labelColor": INK, "titleColor": INK, "labelFontWeight": "bold", "labelAnchor": "start"},
        "view": {"stroke": None},
        "line": {"strokeWidth": 2},
        "concat": {"spacing": 14},
    }
    drawn: dict[str, Any] = chart.properties(config=looks).to_dict()
    return drawn


SMOA = (PALETTE["smoa"], DASHES[0])
LORA = (PALETTE["lora"], DASHES[0])
OTHER = (MUTED, DASHES[1])
"""A line's color and dash."""


def lines(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, tuple[str, list[int]]],
    x: alt.X,
    y: alt.Y,
    width: int = 300,
    height: int = 190,
) -> Any:
    """A line with points for each of ``names``, the values of ``name`` in the rows, in its color and dash."""
    shades, dashes = zip(*names.values(), strict=True)
    legend = _legend() if len(names) > 1 else None
    color = alt.Color("name:N", scale=alt.Scale(domain=list(names), range=list(shades)), legend=legend)
    dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=list(names), range=list(dashes)), legend=legend)
    fields = [str(axis.shorthand).removesuffix(":Q") for axis in (x, y)]
    chart = alt.Chart(values(rows)).encode(
        x=x, y=y, color=color, tooltip=tooltip(name="", **dict.fromkeys(fields, "~g"))
    )
    drawn = alt.layer(chart.mark_line().encode(strokeDash=dash), chart.mark_circle(size=45, opacity=1))
    return drawn.properties(width=width, height=height)


def vega_lite_version() -> str:
    """The version of Vega-Lite that charts are written in, as vl-convert names it."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


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
    return re.sub(r'(?<=[#"])clip\d+(?=[")])', lambda clip: names.setdefault(clip[0], f"clip{len(names)}"), svg)


def _on_white(chart: Any) -> dict[str, Any]:
    return {**specification(chart), "background": "white", "padding": 10}
