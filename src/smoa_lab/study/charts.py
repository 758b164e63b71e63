"""The charts of studies: differences, rates, accuracy by parameters, cost, what was kept against what was learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean, median
from typing import Any

import altair as alt

from smoa_lab.pages.charts import INK, MUTED, PANEL, PAPER, WIDTH, color_of, colors, dashes, shapes, tooltip, values
from smoa_lab.study.results import Row
from smoa_lab.study.trials import Trial

LINE = 22
"""Pixels of an entry in a chart with a line for each."""
COLUMN = 24
"""Pixels of an entry in a chart with a column for each."""
LABELED = alt.Axis(ticks=False, domain=False, labelLimit=240)
COLUMNS = 5
"""Panels side by side."""
ABOVE = 2.0
"""A panel reaches so many times the median distance of an entry's worst loss from the best of all above the latter."""
TALLEST = 2.0
"""The frontier's frame ends so many nats above the loss before."""
MARGIN = 0.1
"""The frontier's frame begins so many nats below the lowest loss."""
LABEL_HEIGHT = 0.055
"""The height of a label as a share of the frontier's frame."""


def final_run(row: Row, seed: int) -> str:
    """Where a page lists a final run of an entry."""
    return f"#{Trial('final', row.entry, row.learning_rate, seed).name}"


def differences(rows: Sequence[Row]) -> Any | None:
    """A forest plot for each budget: test losses minus the reference's, with interval and verdict in words. None before
    there are any."""
    compared: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = row.loss_difference
        if known is not None and math.isfinite(known.mean):
            compared.setdefault(row.budget, []).append(
                {
                    **{key: getattr(row, key) for key in ("entry", "method", "reference")},
                    **{key: getattr(known, key) for key in ("low", "mean", "high")},
                    "seeds": len(row.seeds),
                    "difference": known.signed(1, 4),
                    "verdict": known.label,
                    "clear": known.label in ("better", "worse"),
                    "run": final_run(row, row.seeds[0]),
                }
            )
    if not compared:
        return None
    titled = len({row.budget for row in rows}) > 1
    plots = [_forest(own, f"Budget: {budget}" if titled else "") for budget, own in compared.items()]
    return alt.vconcat(*plots).resolve_scale(color="independent")


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
    """Accuracy with its interval, the entries of equal trained parameters side by side."""
    points = [
        {
            "entry": row.entry,
            "parameters": row.parameters,
            "accuracy": 100 * row.accuracy_interval.mean,
            "low": 100 * row.accuracy_interval.low,
            "high": 100 * row.accuracy_interval.high,
            "run": final_run(row, row.seeds[0]),
        }
        for row in rows
    ]
    chart = alt.Chart().encode(
        x=alt.X("entry:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=240)),
        y=alt.Y("accuracy:Q", title="accuracy on the test part (%)", scale=alt.Scale(zero=False)),
        color=colors({row.entry: row.method for row in rows}),
        tooltip=tooltip(entry="", accuracy=".1f", low=".1f", high=".1f", parameters=","),
    )
    header = alt.Header(format=",", labelAnchor="middle", labelOrient="bottom", titleOrient="bottom")
    return (
        alt.layer(
            chart.mark_rule(strokeWidth=2).encode(y="low:Q", y2="high:Q"),
            chart.mark_circle(size=90, opacity=1).encode(href="run:N"),
            data=values(points),
        )
        .properties(width=alt.Step(COLUMN), height=300)
        .facet(column=alt.Column("parameters:O", title="trained parameters", header=header))
        .resolve_scale(x="independent")
    )


def cost(rows: Sequence[Row]) -> Any | None:
    """Seconds of a run's training, for the entries of which they are known; None where they are of none."""
    bars = [
        {"entry": row.entry, "seconds": row.seconds, "label": f"{row.seconds:.0f} s", "run": final_run(row, seed)}
        for row in rows
        for seed in row.seeds[:1]
        if row.seconds is not None
    ]
    if not bars:
        return None
    seconds = alt.X("seconds:Q", title="seconds of training a run", axis=alt.Axis(grid=False, tickCount=5))
    chart = alt.Chart(values(bars)).encode(y=alt.Y("entry:N", sort=None, title=None, axis=LABELED), x=seconds)
    color = colors({row.entry: row.method for row in rows})
    return alt.layer(
        chart.mark_bar(height=LINE - 8).encode(color=color, href="run:N", tooltip=tooltip(entry="", seconds=".1f")),
        chart.mark_text(align="left", dx=5).encode(text="label:N"),
    ).properties(width=WIDTH - 120, height=LINE * len(bars))


def learning_rates(rows: Sequence[Row], names: Sequence[str]) -> Any | None:
    """A panel for each entry that was searched, its losses by learning rate in color over all others in gray; ``names``
    are those of the search's runs. None without a search."""
    points = [point for row in rows for point in _searched(row, names)]
    if not points:
        return None
    rates = sorted({point["learning_rate"] for point in points})
    across = alt.Scale(type="log", domain=[rates[0] / 1.2, rates[-1] * 1.2], nice=False)
    ticks = alt.Axis(format="~g", values=[10.0**power for power in range(-8, 3)], grid=False)
    x = alt.X("learning_rate:Q", scale=across, title=None, axis=ticks)
    up = alt.Scale(domain=_shown_losses(points), nice=False)
    y = alt.Y("loss:Q", scale=up, title=None, axis=alt.Axis(tickCount=4))
    panels = [_panel(points, entry, x, y) for entry in dict.fromkeys(point["entry"] for point in points)]
    title = "validation loss (nats) by learning rate; the figures are the best"
    return alt.concat(*panels, columns=COLUMNS, title=alt.Title(title, fontWeight="normal", offset=12))


def _searched(row: Row, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs of an entry's search that did not diverge."""
    for rate, loss in row.search.losses.items() if row.search else ():
        if loss is not None:
            stem = f"tuning/{row.entry}/lr-{rate:g}-seed-"
            run = next(f"#{name}" for name in names if name.startswith(stem))
            yield {"entry": row.entry, "method": row.method, "learning_rate": rate, "loss": loss, "run": run}


def _shown_losses(points: Sequence[Mapping[str, Any]]) -> list[float]:
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


def _panel(points: Sequence[Mapping[str, Any]], entry: str, x: alt.X, y: alt.Y) -> Any:
    own = [point for point in points if point["entry"] == entry]
    best = min(own, key=itemgetter("loss"))
    line = alt.Chart(values(own)).encode(x=x, y=y, tooltip=tooltip(entry="", learning_rate="~g", loss=".4f"))
    others = alt.Chart(values(points)).encode(x=x, y=y, detail="entry:N")
    color = color_of(best["method"])
    subtitle = f"{best['loss']:.3f} at {best['learning_rate']:g}"
    return alt.layer(
        others.mark_line(color=MUTED, strokeWidth=1, opacity=0.45, clip=True),
        line.mark_line(color=color, strokeWidth=2.5, clip=True),
        line.mark_circle(color=color, size=55, opacity=1, clip=True).encode(href="run:N"),
    ).properties(width=PANEL, height=PANEL * 0.8, title=alt.Title(entry, color=color, subtitle=subtitle))


def frontier(runs: Sequence[Mapping[str, Any]], titles: tuple[str, str], before: float | None) -> Any | None:
    """What was kept against what was learned, a line for each entry along its learning rates.

    ``runs`` have entry, method, learning_rate, seed, run (where the page lists it), and the losses ``learned`` and
    ``kept``, None where they are unknown. ``titles`` are of those two, ``before`` is of what is kept. None where
    nothing is known."""
    known = [run for run in runs if None not in (run["learned"], run["kept"])]
    if not known:
        return None
    methods = {run["entry"]: run["method"] for run in known}
    means = _means(known)
    kept = [point["kept"] for point in means]
    top = max(kept) + MARGIN
    frame = [min(kept) - MARGIN, top] if before is None else [min(before, *kept) - MARGIN, min(top, before + TALLEST)]
    room = WIDTH - 130
    across = alt.Scale(reverse=True, zero=False, padding=8)
    axis = alt.Axis(labelFlush=False)  # the first and the last number would be drawn into their neighbors
    x = alt.X("learned:Q", title=f"{titles[0]}; right is learned more", scale=across, axis=axis)
    y = alt.Y("kept:Q", title=f"{titles[1]}; down is kept more", scale=alt.Scale(domain=frame, nice=False))
    shown = tooltip(entry="", learning_rate="~g", seed="", learned=".4f", kept=".4f")
    line = alt.Chart(values(means)).encode(x=x, y=y, color=colors(methods), strokeDash=dashes(methods))
    point = alt.Chart(values(known)).encode(x=x, y=y, color=colors(methods), tooltip=shown, href="run:N")
    labels = alt.Chart(values(_labels(means, frame))).encode(x=x, y=y, color=colors(methods))
    layers = [
        line.mark_line(clip=True).encode(order="learning_rate:Q"),
        line.mark_point(size=120, opacity=1, clip=True),
        point.mark_point(size=40, opacity=0.9, clip=True, filled=True).encode(shape=shapes(methods)),
        labels.mark_rule(strokeWidth=0.7).encode(x2=alt.value(room + 8), y2="height:Q"),
        labels.mark_text(align="left").encode(
            x=alt.value(room + 12), y="height:Q", text="entry:N", color=alt.value(INK)
        ),
    ]
    if before is not None:
        layers.append(alt.Chart(values([{"kept": before}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y=y))
    return alt.layer(*layers).properties(width=room, height=360)


def _means(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean losses of each entry at each of its rates, ascending."""
    key = itemgetter("entry", "learning_rate")
    points = []
    for (entry, rate), group in groupby(sorted(runs, key=key), key=key):
        seeds = list(group)
        means = {loss: fmean(run[loss] for run in seeds) for loss in ("learned", "kept")}
        points.append({"entry": entry, "learning_rate": rate, **means})
    return points


def _labels(means: Sequence[dict[str, Any]], frame: Sequence[float]) -> list[dict[str, Any]]:
    """The best point of each entry inside the frame, and the height of its name in a column at the right: ascending,
    moved up until no two names overlap, and then down into the frame."""
    bottom, top = frame
    ends = []
    for _, group in groupby(means, key=itemgetter("entry")):
        own = list(group)
        inside = [point for point in own if point["kept"] <= top]
        lowest = min(own, key=itemgetter("kept")) | {"kept": top}
        ends.append(min(inside, key=itemgetter("learned"), default=lowest))
    ends.sort(key=itemgetter("kept"))
    heights: list[float] = []
    for end in ends:
        height = (end["kept"] - bottom) / (top - bottom)
        heights.append(max(height, heights[-1] + LABEL_HEIGHT) if heights else height)
    over = max(0.0, heights[-1] - 1)
    return [
        end | {"height": bottom + (height - over) * (top - bottom)} for end, height in zip(ends, heights, strict=True)
    ]
