"""The charts of a study: differences with bounds, searches, loss against time, learned against forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import altair as alt

from smoa_lab.pages.charts import (
    DASHES,
    MUTED,
    PAPER,
    color_of,
    colors,
    forest,
    lines,
    name_of,
    shapes,
    tooltip,
    values,
)
from smoa_lab.study.decision import Budget, Result
from smoa_lab.study.results import FinalRun
from smoa_lab.study.search import Chosen
from smoa_lab.study.study import Job

LOG = alt.Scale(type="log", nice=False)
FREE = alt.Scale(zero=False)
BESIDE = 13
"""Pixels between methods of one size, whose numbers of parameters are about the same."""


def final_run(result: Result, seed: int) -> str:
    """Where a page lists a final run of an entry."""
    return f"#{Job('final', result.entry, result.chosen.learning_rate, seed).name}"


def differences(budgets: Mapping[str, Budget]) -> Any | None:
    """A forest plot for each budget: what decides minus that of the entry to take, or of the first in order of cost,
    with both one-sided bounds; None before there are any."""
    plots = []
    for title, budget in budgets.items():
        family, metric, against = budget.family, budget.metric, budget.against
        rows: list[dict[str, Any]] = []
        if family is None or metric is None:
            continue
        for one in (one for one in budget.results if one.entry != against):
            mean = family.mean(one.entry) - family.mean(against)
            ends = family.between(one.entry, against)
            if math.isfinite(mean):
                low, high = sorted(-metric.sign * metric.scale * end for end in ends)
                known = {"low": low, "high": high}
                word = "better" if ends[1] < 0 else "worse" if ends[0] > 0 else "not told apart"
                digits, shown = metric.digits, -metric.sign * metric.scale * mean
                told = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low) else ""
                rows.append(
                    {
                        "entry": _shown(one.entry, one.method),
                        "method": one.method,
                        "mean": shown,
                        **{end: value for end, value in known.items() if math.isfinite(value)},
                        "difference": f"{shown:+.{digits}f}{told}",
                        "verdict": word,
                        "clear": word != "not told apart",
                        "run": final_run(one, one.seeds[0]),
                    }
                )
        if rows:
            side = "left" if metric.sign < 0 else "right"
            axis = f"{metric.title} on held-out rows minus that of {against}; {side} is better"
            plots.append(forest(rows, axis).properties(title=f"Budget: {title}" if len(budgets) > 1 else ""))
    return alt.vconcat(*plots).resolve_scale(color="independent") if plots else None


def sizes(whole: Budget, of_sizes: Mapping[str, Budget], series: Mapping[str, str]) -> Any | None:
    """What decides against trainable parameters, a point for each entry, with both one-sided bounds of its difference
    from the entry to take, or else from the smallest, whose level is dotted; those of a method, one of the ``series``,
    differ in color and shape. A line joins the best of sizes, where bounds say that it is. None before there are any.
    """
    family, metric, against = whole.family, whole.metric, whole.against
    if family is None or metric is None or not math.isfinite(family.mean(against)):
        return None
    scale, title = -metric.sign * metric.scale, f"{metric.title} on held-out rows"
    looks = {one.entry: one.method for one in whole.results}
    names = {entry: _shown(name, looks[entry]) for entry, name in series.items() if entry in looks}
    methods, points = {name: looks[entry] for entry, name in names.items()}, list[dict[str, Any]]()
    for one in whole.results:
        low, high = family.between(one.entry, against)
        ends = {"low": low, "high": high} if one.entry != against and math.isfinite(low + high) else {}
        if math.isfinite(mean := family.mean(one.entry)):
            level = family.mean(against)
            points.append(
                {"entry": one.entry, "method": names[one.entry], "parameters": one.parameters, "mean": scale * mean}
                | {name: scale * (level + end) for name, end in ends.items()}
                | {
                    "clear": one.entry == against or (bool(ends) and (low > 0 or high < 0)),
                    "run": final_run(one, one.seeds[0]),
                }
            )
    sized = [each for each in of_sizes.values() if {*each.order} <= {*family.names}]
    sized.sort(key=lambda each: min(map(whole.order.index, each.order)))  # a file may list them in any order
    best = [
        {"parameters": one.parameters, "mean": scale * family.mean(one.entry), "place": place}
        for place, own in enumerate(sized)
        for one in own.results
        if own.family is not None and len(own.order) > 1 and own.family.worst(one.entry) < 0
    ]
    scaled, ticks = alt.Scale(type="log", nice=False, padding=30), sorted({one["parameters"] for one in points})
    axis = alt.Axis(format=".3~s", values=ticks, labelOverlap=True, grid=False)
    x = alt.X("parameters:Q", scale=scaled, title="trainable parameters", axis=axis)
    y = alt.Y("mean:Q", title=f"{title}; {'lower' if metric.sign < 0 else 'higher'} is better", scale=FREE)
    legend = alt.Legend(title=None, orient="right", symbolType="circle", symbolOpacity=1)
    layers = [alt.Chart(values([{"mean": scale * family.mean(against)}])).mark_rule(color=MUTED, strokeDash=[2, 3])]
    layers[0] = layers[0].encode(y=y)
    for first, second in pairwise(best):
        if second["place"] == first["place"] + 1:
            layers.append(alt.Chart(values([first, second])).mark_line(color=MUTED, strokeWidth=4, opacity=0.5))
            layers[-1] = layers[-1].encode(x=x, y=y)
    for place, name in enumerate(methods):
        beside = BESIDE * (place - (len(methods) - 1) / 2)
        own = alt.Chart(values(point for point in points if point["method"] == name)).encode(
            x=x, color=colors(methods, "method", legend), tooltip=tooltip(entry="", parameters=",", mean=".4g")
        )
        shown = own.encode(y=y, shape=shapes(methods, "method", alt.Legend(title=None, orient="right")), href="run:N")
        layers += [
            own.mark_rule(strokeWidth=2, xOffset=beside).encode(y="low:Q", y2="high:Q"),
            shown.mark_point(size=90, strokeWidth=2, fill=PAPER, opacity=1, xOffset=beside),
            shown.transform_filter("datum.clear").mark_point(size=90, filled=True, opacity=1, xOffset=beside),
        ]
    return alt.layer(*layers).properties(width=480, height=260)


def searches(searched: Mapping[str, Chosen], methods: Mapping[str, str]) -> Any | None:
    """The validation loss at each learning rate that was tried, a line for each entry, and the vertices that were
    chosen; None without any search."""
    rows: list[dict[str, Any]] = [
        {"name": name, "learning rate": rate, "validation loss": loss}
        for name, one in searched.items()
        for rate, loss in one.losses.items()
        if loss is not None
    ]
    rates = sorted({rate for one in searched.values() for rate in one.losses})
    x = alt.X("learning rate:Q", scale=LOG, axis=alt.Axis(format=".1e", values=rates, labelOverlap=True))
    if not rows:
        return None
    drawn = lines(rows, _looks(methods), x, alt.Y("validation loss:Q", scale=FREE), width=500)
    at_vertex = {name: one for name, one in searched.items() if one.place == "vertex"}
    vertices = [{"name": name, "learning rate": one.learning_rate} for name, one in at_vertex.items()]
    rule = alt.Chart(values(vertices)).mark_rule(strokeDash=[2, 3])
    return alt.layer(drawn, rule.encode(x=x, color="name:N")) if vertices else drawn


def losses(results: Sequence[Result], finals: Mapping[str, Mapping[int, FinalRun]]) -> Any | None:
    """The training loss of each entry's first seed against the seconds since its start, by the pace timed for the plan,
    as a resumed run knows its last part alone; None where none was logged."""
    rows = []
    for one in results:
        metrics = finals[one.entry][one.seeds[0]].metrics
        rows += [
            {"name": one.entry, "seconds": entry["step"] * one.step_seconds, "training loss": entry["loss"]}
            for entry in metrics["history"]
            if entry.get("loss") is not None  # as of a run that diverged
        ]
    looks = _looks({one.entry: one.method for one in results})
    return lines(rows, looks, alt.X("seconds:Q"), alt.Y("training loss:Q", scale=FREE), 500) if rows else None


def learned_and_forgotten(results: Sequence[Result], untouched_loss: float | None) -> Any | None:
    """What each entry reached on held-out rows against its loss on general text; None where nothing was forgotten or
    measured."""
    losses = {one.entry: one.values.get("loss", (math.nan,))[0] for one in results}
    known = [one for one in results if one.forgotten is not None and math.isfinite(losses[one.entry])]
    if not known:
        return None
    points = [{"entry": one.entry, "forgotten": one.forgotten, "loss": one.values["loss"][0]} for one in known]
    methods = {one.entry: one.method for one in known}
    if untouched_loss is not None:
        points.append({"entry": "untouched", "forgotten": 0.0, "loss": untouched_loss})
        methods["untouched"] = ""
    legend = alt.Legend(title=None, orient="right")
    shown = alt.Chart(values(points)).encode(
        x=alt.X("forgotten:Q", title="loss on general text, change (nats per token); left forgets less"),
        y=alt.Y("loss:Q", title="loss on held-out rows; lower learned more", scale=FREE),
        color=colors(methods, legend=legend),
        shape=shapes(methods, legend=legend),
        tooltip=tooltip(entry="", forgotten="+.4f", loss=".4f"),
    )
    rule = alt.Chart(values([{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x="zero:Q")
    return alt.layer(rule, shown.mark_point(size=90, strokeWidth=2, opacity=1)).properties(width=440, height=220)


def _shown(entry: str, method: str) -> str:
    """What pictures call an entry: its method, and its own name where that is another."""
    name = name_of(method)
    return name if entry == name.lower() else f"{name}: {entry}"


def _looks(methods: Mapping[str, str]) -> dict[str, tuple[str, list[int]]]:
    """The color of each entry's method, and a line that differs in gray, and from others of the method first."""
    places = {method: count(place) for place, method in enumerate(dict.fromkeys(methods.values()))}
    return {name: (color_of(method), DASHES[next(places[method]) % len(DASHES)]) for name, method in methods.items()}
