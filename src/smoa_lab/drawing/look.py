"""The look of every picture: one color for each method, lines that differ in gray too, type, axes and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import altair as alt

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

MUTED = "#909498"
"""What is not in the foreground, and methods without a color of their own."""

INK = "currentColor"
"""Text and axes: the color of the page's text, black in a file."""

PAPER = "white"
"""The inside of hollow marks: the color of the page's paper, white in a file."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
"""The lines of the entries of one method, in their order."""

SHAPES = ("circle", "square", "triangle-up", "diamond")
"""Their points."""

WIDTH = 620
PANEL = 144
"""Pixels of a chart, and of a panel of several."""


Mark = TypeVar("Mark")


def color_of(method: str) -> str:
    """The method's color."""
    return PALETTE.get(method, MUTED)


def dash_of(methods: Mapping[str, str]) -> dict[str, list[int]]:
    """The line of each entry, given its method: entries of one method differ."""
    return _in_turn(methods, DASHES)


def _in_turn(methods: Mapping[str, str], marks: Sequence[Mark]) -> dict[str, Mark]:
    seen: Counter[str] = Counter()
    found = {}
    for entry, method in methods.items():
        found[entry] = marks[seen[method] % len(marks)]
        seen[method] += 1
    return found


def colors(methods: Mapping[str, str], field: str = "entry", legend: bool = False) -> alt.Color:
    """The encoding of ``field``, whose values are the keys, by the color of each one's method."""
    scale = alt.Scale(domain=list(methods), range=[color_of(method) for method in methods.values()])
    return alt.Color(f"{field}:N", scale=scale, legend=_legend() if legend else None)


def dashes(methods: Mapping[str, str], field: str = "entry", legend: bool = False) -> alt.StrokeDash:
    """The encoding of ``field`` by line, to go with :func:`colors`, and in one legend with it."""
    lines = dash_of(methods)
    scale = alt.Scale(domain=list(lines), range=list(lines.values()))
    return alt.StrokeDash(f"{field}:N", scale=scale, legend=_legend() if legend else None)


def shapes(methods: Mapping[str, str]) -> alt.Shape:
    """The encoding of entries by the shape of their points, to go with :func:`colors`."""
    marks = _in_turn(methods, SHAPES)
    return alt.Shape("entry:N", scale=alt.Scale(domain=list(marks), range=list(marks.values())), legend=None)


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
    found: dict[str, Any] = chart.properties(config=looks).to_dict()
    return found
