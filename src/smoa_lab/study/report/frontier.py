"""The picture of a sequence: what was kept of the first task against what was learned of the second."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from smoa_lab.drawing.plots import new_figure
from smoa_lab.study.report.curves import Curve
from smoa_lab.study.report.pictures import MARKERS, STYLES

CAPTION = (
    "Every point is a run; a line joins the mean over seeds along an entry's learning rates. Right is learned more, "
    "down is kept more. The dotted line is the first task's loss before the second task. Runs that lost more than the "
    "frame shows are in the table."
)
TALLEST = 2.0
"""The frame ends so many nats above the loss before the second task."""
MARGIN = 0.1
"""And begins so many below the lowest."""
LABEL_HEIGHT = 0.055
"""Of a label, as a share of the frame's height."""


def frontier(curves: Sequence[Curve], before: float | None) -> Any:
    """The figure, in black, each line named beside its best run."""
    drawn, axes = new_figure(5.5)
    for own, marker, style in zip(curves, cycle(MARKERS), cycle(STYLES), strict=False):
        axes.plot(own.second.mean(), own.first.mean(), style, color="#000000", linewidth=0.8)
        runs = (task.nll.sum(axis=-1) / task.tokens.sum() for task in (own.second, own.first))
        axes.scatter(*(losses.ravel() for losses in runs), marker=marker, s=22, color="#000000")
    if before is not None:
        axes.axhline(before, color="#000000", linestyle=":", linewidth=0.8)
        lowest = min(before, *(float(own.first.mean().min()) for own in curves))
        axes.set_ylim(lowest - MARGIN, min(axes.get_ylim()[1], before + TALLEST))
    axes.invert_xaxis()
    axes.set_xlabel("loss on the second task (nats per token); right is learned more")
    axes.set_ylabel("loss on the first task\n(nats per token); down is kept more")
    _label(axes, curves)
    return drawn


def _label(axes: Any, curves: Sequence[Curve]) -> None:
    """Names in a column at the right, each with a thin line to its entry's best run inside the frame."""
    top = axes.get_ylim()[1]
    ends = [(own, *_end(own, top)) for own in curves]
    ends.sort(key=lambda end: end[2])
    bottom = axes.get_ylim()[0]
    heights = _apart([(end[2] - bottom) / (top - bottom) for end in ends])
    for (own, second, first), height in zip(ends, heights, strict=True):
        axes.annotate(
            own.entry,
            xy=(second, first),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#000000", "shrinkB": 4, "relpos": (0, 0.5)},
        )


def _end(own: Curve, top: float) -> tuple[float, float]:
    """The mean losses at the rate that learned most, of those in the frame."""
    second, first = own.second.mean(), own.first.mean()
    inside = first <= top
    best = int(np.argmin(np.where(inside, second, np.inf))) if inside.any() else int(np.argmin(first))
    return float(second[best]), min(float(first[best]), top)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved up until no two labels overlap, and then down into the frame."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_HEIGHT) if moved else height)
    over = max(0.0, moved[-1] - 1) if moved else 0.0
    return [height - over for height in moved]
