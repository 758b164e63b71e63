"""Losses by learning rate in small multiples: an entry in color over all others in gray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import altair as alt

from smoa_lab.drawing.look import MUTED, PANEL, color_of, tooltip, values
from smoa_lab.study.report.results.rows import Row

COLUMNS = 5
TITLE = "validation loss (nats) by learning rate; the figures are the best"
ABOVE = 2.0
"""A panel reaches so many times the median distance of an entry's worst loss from the best of all above the latter."""


def learning_rates(rows: Sequence[Row], names: Sequence[str]) -> Any | None:
    """A panel for each entry that was searched; ``names`` are those of the search's runs. None without a search."""
    points = [point for row in rows for point in _points(row, names)]
    if not points:
        return None
    rates = sorted({point["learning_rate"] for point in points})
    scales = {
        "x": alt.Scale(type="log", domain=[rates[0] / 1.2, rates[-1] * 1.2], nice=False),
        "y": alt.Scale(domain=_range(points), nice=False),
    }
    panels = [_panel(points, entry, scales) for entry in dict.fromkeys(point["entry"] for point in points)]
    return alt.concat(*panels, columns=COLUMNS, title=alt.Title(TITLE, fontWeight="normal", offset=12))


def _points(row: Row, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs of an entry's search that did not diverge."""
    for rate, loss in row.search.losses.items() if row.search else ():
        if loss is not None:
            stem = f"tuning/{row.entry}/lr-{rate:g}-seed-"
            run = next(f"#{name}" for name in names if name.startswith(stem))
            yield {"entry": row.entry, "method": row.method, "learning_rate": rate, "loss": loss, "run": run}


def _range(points: Sequence[Mapping[str, Any]]) -> list[float]:
    """The losses that a panel shows: from just below the lowest to where most entries' worst rates are seen. Lines
    leave it at the top."""
    losses: dict[str, list[float]] = {}
    for point in points:
        losses.setdefault(point["entry"], []).append(point["loss"])
    lowest = min(map(min, losses.values()))
    highest = max(map(max, losses.values()))
    usual = ABOVE * (median(map(median, losses.values())) - lowest)
    top = min(highest, lowest + usual) if usual else highest
    room = 0.06 * ((top - lowest) or 1.0)
    return [lowest - room, top + room]


def _panel(points: Sequence[Mapping[str, Any]], entry: str, scales: Mapping[str, alt.Scale]) -> Any:
    own = [point for point in points if point["entry"] == entry]
    best = min(own, key=lambda point: point["loss"])
    decades = [10.0**power for power in range(-8, 3)]
    x = alt.X("learning_rate:Q", scale=scales["x"], title=None, axis=alt.Axis(format="~g", values=decades, grid=False))
    y = alt.Y("loss:Q", scale=scales["y"], title=None, axis=alt.Axis(tickCount=4))
    line = alt.Chart(values(own)).encode(x=x, y=y, tooltip=tooltip(entry="", learning_rate="~g", loss=".4f"))
    others = alt.Chart(values(points)).encode(x=x, y=y, detail="entry:N")
    color = color_of(best["method"])
    return alt.layer(
        others.mark_line(color=MUTED, strokeWidth=1, opacity=0.45, clip=True),
        line.mark_line(color=color, strokeWidth=2.5, clip=True),
        line.mark_circle(color=color, size=55, opacity=1, clip=True).encode(href="run:N"),
    ).properties(
        width=PANEL,
        height=PANEL * 0.8,
        title=alt.Title(entry, color=color, subtitle=f"{best['loss']:.3f} at {best['learning_rate']:g}"),
    )
