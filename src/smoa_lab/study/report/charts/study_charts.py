"""The charts of a study's entries: a forest plot of differences, accuracy by parameters, and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from smoa_lab.drawing.look import INK, MUTED, PAPER, WIDTH, colors, tooltip, values
from smoa_lab.study.report.results.rows import Row, difference_cells
from smoa_lab.study.trials import Trial

LINE = 22
"""Pixels of an entry in a chart with a line for each."""
COLUMN = 24
"""Pixels between entries of equal parameters."""
LABELED = alt.Axis(ticks=False, domain=False, labelLimit=240)


def methods_of(rows: Sequence[Row]) -> dict[str, str]:
    """The method of each entry."""
    return {row.entry: row.method for row in rows}


def final_run(row: Row, seed: int) -> str:
    """Where a page lists a final run of an entry."""
    return f"#{Trial('final', row.entry, row.learning_rate, seed).name}"


def differences(rows: Sequence[Row]) -> Any | None:
    """A forest plot for each budget: test losses minus the reference's, with interval and verdict in words. None before
    there are any."""
    budgets = {row.budget: [one for one in rows if one.budget == row.budget] for row in rows}
    known = {budget: found for budget, own in budgets.items() if (found := list(_compared(own)))}
    if not known:
        return None
    titles = {name: f"Budget: {name}" if len(budgets) > 1 else "" for name in known}
    return alt.vconcat(*(_forest(own, titles[name]) for name, own in known.items())).resolve_scale(color="independent")


def _compared(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        found = row.loss_difference
        if found is not None and math.isfinite(found.mean):
            mean, interval, verdict = difference_cells(row, found, 1, 4)
            shared = {"entry": row.entry, "method": row.method, "reference": row.reference, "seeds": len(row.seeds)}
            ends = {"low": found.low, "mean": found.mean, "high": found.high}
            told = {"difference": f"{mean} {interval}", "verdict": verdict, "clear": verdict in ("better", "worse")}
            yield {**shared, **ends, **told, "run": final_run(row, row.seeds[0])}


def _forest(rows: Sequence[dict[str, Any]], title: str) -> Any:
    shown = alt.Chart(values(rows)).encode(y=alt.Y("entry:N", sort=None, title=None, axis=LABELED))
    methods = {row["entry"]: row["method"] for row in rows}
    colored = shown.encode(color=colors(methods), tooltip=tooltip(entry="", difference="", verdict="", seeds="d"))
    axis = alt.X("low:Q", title=f"test loss minus that of {rows[0]['reference']} (nats); left is better")
    point = colored.encode(x="mean:Q", href="run:N")
    words = shown.mark_text(align="left", fontSize=11)
    room = WIDTH - 240
    return alt.layer(
        alt.Chart(values([{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x="zero:Q"),
        colored.mark_rule(strokeWidth=2).encode(x=axis, x2="high:Q"),
        point.mark_point(size=70, strokeWidth=2, fill=PAPER, opacity=1),
        point.transform_filter("datum.clear").mark_circle(size=90, opacity=1),
        words.encode(x=alt.value(room + 12), text="difference:N"),
        words.encode(x=alt.value(room + 194), text="verdict:N"),
    ).properties(width=room, height=LINE * len(rows), title=title)


def accuracy(rows: Sequence[Row]) -> Any:
    """Accuracy with its interval by trained parameters, on a logarithmic axis that spreads entries of equal numbers."""
    places, ticks, width = _spread([row.parameters for row in rows])
    points = [
        {
            "entry": row.entry,
            "place": place,
            "parameters": row.parameters,
            "accuracy": 100 * row.accuracy_interval.mean,
            "low": 100 * row.accuracy_interval.low,
            "high": 100 * row.accuracy_interval.high,
            "run": final_run(row, row.seeds[0]),
        }
        for row, place in zip(rows, places, strict=True)
    ]
    named = "".join(f"datum.value == {place} ? '{number:,}' : " for place, number in ticks.items())
    axis = alt.Axis(values=list(ticks), labelExpr=f"{named}''", labelOverlap=False, grid=False)
    x = alt.X("place:Q", title="trained parameters", axis=axis, scale=alt.Scale(domain=[0, width], nice=False))
    chart = alt.Chart(values(points)).encode(
        x=x,
        y=alt.Y("accuracy:Q", title="accuracy on the test part (%)", scale=alt.Scale(zero=False)),
        color=colors(methods_of(rows)),
        tooltip=tooltip(entry="", accuracy=".1f", low=".1f", high=".1f", parameters=","),
    )
    return alt.layer(
        chart.mark_rule(strokeWidth=2).encode(y="low:Q", y2="high:Q"),
        chart.mark_circle(size=90, opacity=1).encode(href="run:N"),
        chart.mark_text(align="left", angle=270, dx=6).encode(y="high:Q", text="entry:N", color=alt.value(INK)),
    ).properties(width=width, height=300)


def _spread(numbers: Sequence[int]) -> tuple[list[float], dict[float, int], float]:
    """The place of each entry in pixels, those of equal numbers side by side; the middle of each number's group; and
    the width of all. Groups stand on a logarithmic axis of a factor of 2 at least, moved apart where they overlap.
    """
    groups = sorted(set(numbers))
    widths = [COLUMN * numbers.count(number) for number in groups]
    lowest, span = math.log(groups[0]), math.log(max(2, groups[-1] / groups[0]))
    room = WIDTH - (widths[0] + widths[-1]) / 2 - 3 * COLUMN
    middles: list[float] = []
    for number, width in zip(groups, widths, strict=True):
        wanted = widths[0] / 2 + COLUMN + room * (math.log(number) - lowest) / span
        nearest = middles[-1] + (widths[len(middles) - 1] + width) / 2 + 2 * COLUMN if middles else wanted
        middles.append(round(max(wanted, nearest), 1))
    starts = {number: middle - width / 2 for number, middle, width in zip(groups, middles, widths, strict=True)}
    places = [starts[number] + COLUMN * (numbers[:i].count(number) + 0.5) for i, number in enumerate(numbers)]
    return places, dict(zip(middles, groups, strict=True)), middles[-1] + widths[-1] / 2 + COLUMN


def cost(rows: Sequence[Row]) -> Any | None:
    """Seconds of a run's training, for the entries of which they are known; None where they are of none."""
    known = [
        {
            "entry": row.entry,
            "seconds": row.seconds,
            "told": f"{row.seconds:.0f} s",
            "run": final_run(row, row.seeds[0]),
        }
        for row in rows
        if row.seconds is not None
    ]
    if not known:
        return None
    seconds = alt.X("seconds:Q", title="seconds of training a run", axis=alt.Axis(grid=False, tickCount=5))
    chart = alt.Chart(values(known)).encode(y=alt.Y("entry:N", sort=None, title=None, axis=LABELED), x=seconds)
    return alt.layer(
        chart.mark_bar(height=LINE - 8).encode(
            color=colors(methods_of(rows)), href="run:N", tooltip=tooltip(entry="", seconds=".1f")
        ),
        chart.mark_text(align="left", dx=5).encode(text="told:N"),
    ).properties(width=WIDTH - 120, height=LINE * len(known))
