"""The pictures of a study: differences with bounds, and quality against size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt

from smoa_lab.pages.charts import colors, forest, name_of, shapes, values
from smoa_lab.study.bounds import Family
from smoa_lab.study.metrics import Metric
from smoa_lab.study.verdict import Verdict


def differences(found: Mapping[str, Verdict]) -> Any | None:
    """A forest plot for each budget: what decides minus that of the entry to take, or of the first in order of cost,
    with both one-sided bounds; None before there are any."""
    plots = []
    for budget, of in found.items():
        if of.decides is None or not (rows := _differences(of, *of.decides)):
            continue
        metric, side = of.decides[0], "left" if of.decides[0].sign < 0 else "right"
        axis = f"{metric.title} on held-out rows minus that of {of.against}; {side} is better"
        plots.append(forest(rows, axis).properties(title=f"Budget: {budget}" if len(found) > 1 else ""))
    return alt.vconcat(*plots).resolve_scale(color="independent") if plots else None


def _differences(of: Verdict, metric: Metric, family: Family) -> list[dict[str, Any]]:
    """A row of the plot for each entry that can be told from the one to which all are shown."""
    rows = list[dict[str, Any]]()
    for name in of.entries:
        mean = float(family.of_seeds(name).mean() - family.of_seeds(of.against).mean())
        ends = family.lower(name, of.against), family.upper(name, of.against)
        if name == of.against or not math.isfinite(mean) or not math.isfinite(sum(ends)):
            continue
        scale, digits = -metric.sign * metric.scale, metric.digits
        low, high = sorted(scale * end for end in ends)
        word = "better" if ends[1] < 0 else "worse" if ends[0] > 0 else "not told apart"
        method = of.study.entries[name].method
        row = {
            "entry": name_of(method) if name == name_of(method).lower() else f"{name_of(method)}: {name}",
            "method": method,
            "mean": scale * mean,
            "low": low,
            "high": high,
            "difference": f"{scale * mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            "verdict": word,
            "clear": word != "not told apart",
            "run": "",
        }
        rows.append(row)
    return rows


def sizes(found: Mapping[str, Verdict]) -> Any | None:
    """What decides against trained parameters, a line for each method, with the standard deviation over seeds; None
    where fewer than two budgets have results."""
    known, points = [(of, *of.decides) for of in found.values() if of.decides], list[dict[str, Any]]()
    if len(known) < 2:
        return None
    for of, metric, family in known:
        for name in (name for name in of.entries if not family.diverged(name)):
            own = -metric.sign * metric.scale * family.of_seeds(name)
            mean, spread = float(own.mean()), float(own.std(ddof=1))
            point = {"method": of.study.entries[name].method, "parameters": of.parameters(name), "mean": mean}
            points.append({**point, "low": mean - spread, "high": mean + spread})
    methods = {point["method"]: point["method"] for point in points}
    ticks = sorted({point["parameters"] for point in points})
    x = alt.X("parameters:Q", title="trained parameters", scale=alt.Scale(type="log", nice=False, padding=30))
    x = x.axis(format=".3~s", values=ticks, labelOverlap=True)
    y = alt.Y("mean:Q", scale=alt.Scale(zero=False), title=f"{known[0][1].title} on held-out rows")
    chart = alt.Chart(values(points)).encode(x=x, y=y, color=colors(methods, "method", alt.Legend(title=None)))
    marks = chart.mark_point(size=90, filled=True, opacity=1).encode(shape=shapes(methods, "method"))
    bars = chart.mark_rule().encode(y="low:Q", y2="high:Q")
    return alt.layer(chart.mark_line(), bars, marks).properties(width=480, height=260)
