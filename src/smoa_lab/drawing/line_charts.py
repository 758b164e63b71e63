"""Lines of a few named things, with a legend: the common form of the pictures in the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from smoa_lab.drawing.look import DASHES, MUTED, PALETTE, tooltip, values

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
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2, columns=2, labelLimit=300)
    color = alt.Color("name:N", scale=alt.Scale(domain=list(names), range=list(shades)), legend=legend)
    dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=list(names), range=list(dashes)), legend=legend)
    fields = [str(axis.shorthand).removesuffix(":Q") for axis in (x, y)]
    chart = alt.Chart(values(rows)).encode(
        x=x, y=y, color=color, tooltip=tooltip(name="", **dict.fromkeys(fields, "~g"))
    )
    drawn = alt.layer(chart.mark_line().encode(strokeDash=dash), chart.mark_circle(size=45, opacity=1))
    return drawn.properties(width=width, height=height)
