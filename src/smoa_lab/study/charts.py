"""The charts of studies: each entry's difference to its reference, and what was kept against what was learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any

import altair as alt

from smoa_lab.pages.charts import DASHES, MUTED, PAPER, color_of, forest, tooltip, values
from smoa_lab.study.results import Row
from smoa_lab.study.trials import Trial

FRONTIER = 190
"""Pixels of a side of a frontier's panel."""
TALLEST = 2.0
"""The frontier's frame ends so many nats above its lowest loss."""


def final_run(row: Row, seed: int) -> str:
    """Where a page lists a final run of an entry."""
    return f"#{Trial('final', row.entry, row.learning_rate, seed).name}"


def differences(rows: Sequence[Row], names: Mapping[str, str]) -> Any | None:
    """A forest plot for each budget: test losses minus the reference's, with interval and verdict in words. Entries are
    called by their ``names``. None before there are any differences."""
    compared: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = row.loss_difference
        if known is not None and math.isfinite(known.mean):
            compared.setdefault(row.budget, []).append(
                {
                    "entry": names.get(row.entry, row.entry),
                    "reference": names.get(row.reference, row.reference),
                    "method": row.method,
                    **{key: getattr(known, key) for key in ("low", "mean", "high")},
                    "difference": known.signed(1, 4),
                    "verdict": known.label,
                    "clear": known.label in ("better", "worse"),
                    "run": final_run(row, row.seeds[0]),
                }
            )
    if not compared:
        return None
    titled = len({row.budget for row in rows}) > 1
    plots = [
        forest(own, f"test loss minus that of {own[0]['reference']} (nats per token); left is better").properties(
            title=f"Budget: {budget}" if titled else ""
        )
        for budget, own in compared.items()
    ]
    return alt.vconcat(*plots).resolve_scale(color="independent")


def frontier(
    runs: Sequence[Mapping[str, Any]], titles: tuple[str, str], before: float | None, references: Mapping[str, str]
) -> Any | None:
    """What was kept against what was learned: a panel for each entry, beside the one that ``references`` has of it.

    ``runs`` have entry, method, learning_rate, seed, run (where the page lists it), and the losses ``learned`` and
    ``kept``, None where they are unknown. ``titles`` are of those two, ``before`` is of what is kept. None where
    nothing is known."""
    known = [run for run in runs if None not in (run["learned"], run["kept"])]
    if not known:
        return None
    by_entry: dict[str, list[Mapping[str, Any]]] = {}
    for run in known:
        by_entry.setdefault(run["entry"], []).append(run)
    means = _means(known)
    kept = [point["kept"] for point in means] + ([] if before is None else [before])
    lowest = min(point["kept"] for point in means)  # in the frame, however far above ``before``
    top = min(max(kept) + 0.1, max(min(kept) + TALLEST, lowest + 0.1))
    learned = [run["learned"] for run in known if run["kept"] <= top]
    scales = [
        alt.Scale(domain=ends, nice=False, padding=8) for ends in ([min(learned), max(learned)], [min(kept), top])
    ]
    axis = alt.Axis(tickCount=4, labelFlush=False)
    x = alt.X("learned:Q", title=titles[0], scale=scales[0], axis=axis)
    y = alt.Y("kept:Q", title=titles[1], scale=scales[1], axis=axis)
    beside = {reference for entry, reference in references.items() if entry in by_entry and entry != reference}
    panels = []
    for entry, own in by_entry.items():
        if entry in beside:
            continue
        reference = references.get(entry, entry)
        others = by_entry.get(reference, []) if reference != entry else []
        curves = [*_curve(others, x, y, dashed=True), *_curve(own, x, y)]
        if before is not None:
            rule = alt.Chart(values([{"kept": before}])).mark_rule(color=MUTED, strokeDash=[2, 3])
            curves.append(rule.encode(y=y))
        heading = alt.Title(entry, subtitle=f"hollow: {reference}" if others else "")
        panels.append(alt.layer(*curves).properties(width=FRONTIER, height=FRONTIER, title=heading))
    return alt.concat(*panels, columns=3)


def _curve(runs: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y, dashed: bool = False) -> list[Any]:
    """An entry's runs as dots, and their means by learning rate as points, on a line where they are more than two."""
    if not runs:
        return []
    means, color = _means(runs), color_of(runs[0]["method"])
    mean = alt.Chart(values(means)).encode(x=x, y=y)
    line = mean.mark_line(color=color, strokeDash=DASHES[dashed], clip=True).encode(order="learning_rate:Q")
    shown = tooltip(entry="", learning_rate="~g", seed="", learned=".4f", kept=".4f")
    dots = alt.Chart(values(runs)).encode(x=x, y=y, tooltip=shown, href="run:N")
    return [
        *([line] if len(means) > 2 else []),
        mean.mark_point(color=color, size=60, fill=PAPER if dashed else color, opacity=1, clip=True),
        dots.mark_circle(color=color, size=14, opacity=0.6, clip=True),
    ]


def _means(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean losses of each entry at each of its rates, ascending."""
    key = itemgetter("entry", "learning_rate")
    points = []
    for (entry, rate), group in groupby(sorted(runs, key=key), key=key):
        seeds = list(group)
        means = {loss: fmean(run[loss] for run in seeds) for loss in ("learned", "kept")}
        points.append({"entry": entry, "learning_rate": rate, **means})
    return points
