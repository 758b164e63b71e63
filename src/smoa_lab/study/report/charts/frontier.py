"""The chart of what was kept against what was learned: a line for each entry along its learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any

import altair as alt

from smoa_lab.drawing.look import INK, MUTED, WIDTH, colors, dashes, shapes, tooltip, values

CAPTION = (
    "Right is learned more, down is kept more. Every point is a run, a ring the mean over seeds; a line joins the "
    "rings along an entry's learning rates. The dotted line is the loss before. Runs that lost more than the frame "
    "shows are in the table."
)
TALLEST = 2.0
"""The frame ends so many nats above the loss before."""
MARGIN = 0.1
"""The frame begins so many nats below the lowest loss."""
LABEL_HEIGHT = 0.055
"""The height of a label as a share of the frame's."""
ROOM = WIDTH - 130


def frontier(runs: Sequence[Mapping[str, Any]], titles: tuple[str, str], before: float | None) -> Any | None:
    """The chart of ``runs``: entry, method, learning_rate, seed, run (where the page lists it), and the losses
    ``learned`` and ``kept``, None where they are unknown. ``titles`` are of those two, ``before`` is of what is kept.
    None where nothing is known."""
    known = [run for run in runs if None not in (run["learned"], run["kept"])]
    if not known:
        return None
    methods = {run["entry"]: run["method"] for run in known}
    means = _means(known)
    frame = _frame([point["kept"] for point in means], before)
    across = alt.Scale(reverse=True, zero=False, padding=8)
    axis = alt.Axis(labelFlush=False)  # the first and the last number would be drawn into their neighbors
    x = alt.X("learned:Q", title=f"{titles[0]}; right is learned more", scale=across, axis=axis)
    y = alt.Y("kept:Q", title=f"{titles[1]}; down is kept more", scale=alt.Scale(domain=frame, nice=False))
    told = tooltip(entry="", learning_rate="~g", seed="", learned=".4f", kept=".4f")
    line = alt.Chart(values(means)).encode(x=x, y=y, color=colors(methods), strokeDash=dashes(methods))
    point = alt.Chart(values(known)).encode(x=x, y=y, color=colors(methods), tooltip=told, href="run:N")
    labels = alt.Chart(values(_labels(means, frame))).encode(x=x, y=y, color=colors(methods))
    layers = [
        line.mark_line(clip=True).encode(order="learning_rate:Q"),
        line.mark_point(size=120, opacity=1, clip=True),
        point.mark_point(size=40, opacity=0.9, clip=True, filled=True).encode(shape=shapes(methods)),
        labels.mark_rule(strokeWidth=0.7).encode(x2=alt.value(ROOM + 8), y2="height:Q"),
        labels.mark_text(align="left").encode(
            x=alt.value(ROOM + 12), y="height:Q", text="entry:N", color=alt.value(INK)
        ),
    ]
    if before is not None:
        layers.append(alt.Chart(values([{"kept": before}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y=y))
    return alt.layer(*layers).properties(width=ROOM, height=360)


def _frame(kept: Sequence[float], before: float | None) -> list[float]:
    low, high = (min(kept), max(kept)) if before is None else (min(before, *kept), max(before, *kept))
    return [low - MARGIN, high + MARGIN if before is None else min(high + MARGIN, before + TALLEST)]


def _means(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean losses of each entry at each of its rates, ascending."""
    key = itemgetter("entry", "learning_rate")
    found = []
    for (entry, rate), group in groupby(sorted(runs, key=key), key=key):
        seeds = list(group)
        means = {loss: fmean(run[loss] for run in seeds) for loss in ("learned", "kept")}
        found.append({"entry": entry, "learning_rate": rate, **means})
    return found


def _labels(means: Sequence[dict[str, Any]], frame: Sequence[float]) -> list[dict[str, Any]]:
    """The best point of each entry inside the frame, and the height of its name in a column at the right."""
    bottom, top = frame
    ends = []
    for _, group in groupby(means, key=itemgetter("entry")):
        own = list(group)
        inside = [point for point in own if point["kept"] <= top]
        ends.append(
            min(inside, key=itemgetter("learned")) if inside else min(own, key=itemgetter("kept")) | {"kept": top}
        )
    ends.sort(key=itemgetter("kept"))
    heights = _apart([(end["kept"] - bottom) / (top - bottom) for end in ends])
    return [end | {"height": bottom + height * (top - bottom)} for end, height in zip(ends, heights, strict=True)]


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved up until no two labels overlap, and then down into the frame."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_HEIGHT) if moved else height)
    over = max(0.0, moved[-1] - 1) if moved else 0.0
    return [height - over for height in moved]
