"""The charts of one run: loss by step, accuracies, and what was learned and forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.pages.charts import INK, MUTED, WIDTH, color_of, save_picture, tooltip, values

History = Sequence[Mapping[str, Any]]
Evaluation = Mapping[str, Mapping[str, Any]]
HELD_OUT = "held-out rows"
KINDS = {"training": "loss", "validation": "eval_loss"}
STAGES = ("before", "after")
LINE = 17
"""Pixels of a bar."""


def draw_run(history: History, evaluation: Evaluation, file: Path, method: str, title: str) -> None:
    """Save losses and accuracies as ``file``, a PNG; nothing if nothing was logged."""
    charts = [chart for chart in (losses(history, evaluation, method), accuracies(evaluation, method)) if chart]
    if charts:
        drawn = alt.vconcat(*charts, title=alt.Title(title)).resolve_scale(color="independent")
        save_picture(drawn, file)


def losses(history: History, evaluation: Evaluation, method: str) -> Any | None:
    """The trainer's loss by step, each line named at its end; of held-out rows a point before and after, unless the
    trainer's loss is another one: that of preferences."""
    points = [
        {"step": entry["step"], "loss": entry[key], "data": kind}
        for kind, key in KINDS.items()
        for entry in history
        if entry.get(key) is not None  # as of a run that diverged
    ]
    if not points:
        return None
    prefers = any("rewards/margins" in entry for entry in history)
    title = "loss of preferences" if prefers else "loss on trained tokens (nats per token)"
    stages = [] if prefers else zip(STAGES, (0, history[-1]["step"]), strict=True)
    known = ((step, evaluation.get(stage, {}).get("loss")) for stage, step in stages)
    held_out = [{"step": step, "loss": loss, "data": HELD_OUT} for step, loss in known if loss is not None]
    shades = alt.Scale(domain=[*KINDS, HELD_OUT], range=[color_of(method), MUTED, INK])
    chart = alt.Chart(values(points)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("data:N", scale=shades, legend=None),
        tooltip=tooltip(data="", step="d", loss=".4f"),
    )
    names = {point["data"]: point for point in [*points, *reversed(held_out)]}.values()
    return alt.layer(
        chart.mark_line(point=alt.OverlayMarkDef(size=24)),
        chart.properties(data=values(held_out)).mark_point(shape="diamond", size=90, filled=True, opacity=1),
        chart.properties(data=values(names)).mark_text(align="left", dx=8).encode(text="data:N"),
    ).properties(width=WIDTH - 80, height=230)


def accuracies(evaluation: Evaluation, method: str) -> Any | None:
    """A bar for each stage with its standard error; a tick at the share of the commonest label. None where accuracy was
    not measured before and after."""
    if not all("accuracy" in evaluation.get(stage, {}) for stage in STAGES):
        return None
    rows = [
        {
            "stage": stage,
            "accuracy": 100 * scores["accuracy"],
            "low": 100 * (scores["accuracy"] - scores["accuracy_stderr"]),
            "high": 100 * (scores["accuracy"] + scores["accuracy_stderr"]),
            "label": f"{100 * scores['accuracy']:.1f} %",
            "majority": 100 * scores["majority"],
            "rows": scores["rows"],
        }
        for stage, scores in ((stage, evaluation[stage]) for stage in STAGES)
    ]
    shades = alt.Scale(domain=list(STAGES), range=[MUTED, color_of(method)])
    chart = alt.Chart(values(rows)).encode(
        y=alt.Y("stage:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False)),
        tooltip=tooltip(stage="", accuracy=".1f", low=".1f", high=".1f", rows="d"),
    )
    title = "accuracy on held-out rows (%), with the standard error; a tick is the commonest label's share"
    x = alt.X("accuracy:Q", title=title, scale=alt.Scale(domain=[0, 100]))
    return alt.layer(
        chart.mark_bar().encode(x=x, color=alt.Color("stage:N", scale=shades, legend=None)),
        chart.mark_rule().encode(x="low:Q", x2="high:Q"),
        chart.mark_text(align="left", dx=5).encode(x="high:Q", text="label:N"),
        chart.mark_tick(thickness=2, color=INK).encode(x="majority:Q"),
    ).properties(width=WIDTH - 80, height=2 * LINE + 8)


def balance(evaluation: Evaluation, forgot: Mapping[str, Any] | None, method: str) -> Any | None:
    """The losses before and after on held-out data and on general text, as two points joined by a line; None where
    neither is known."""
    rows: list[dict[str, Any]] = []
    before, after = (evaluation.get(stage, {}).get("loss") for stage in STAGES)
    if None not in (before, after):
        rows.append({"of": "held-out data (learned)", "before": before, "after": after})
    if forgot and None not in (forgot["before"], forgot["after"]):
        rows.append({"of": "general text (forgot)", "before": forgot["before"], "after": forgot["after"]})
    if not rows:
        return None
    labeled = [{**row, "label": f"{row['after'] - row['before']:+.3f}"} for row in rows]
    chart = alt.Chart(values(labeled)).encode(
        y=alt.Y("of:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=240)),
        tooltip=tooltip(of="", before=".4f", after=".4f"),
    )
    x = alt.X(
        "before:Q", title="loss before (gray) and after (nats per token)", scale=alt.Scale(zero=False, padding=28)
    )
    return alt.layer(
        chart.mark_rule(strokeWidth=2, color=MUTED).encode(x=x, x2="after:Q"),
        chart.mark_circle(size=90, color=MUTED, opacity=1).encode(x=x),
        chart.mark_circle(size=90, color=color_of(method), opacity=1).encode(x="after:Q"),
        chart.mark_text(dy=-11).encode(x="after:Q", text="label:N"),
    ).properties(width=WIDTH - 180, height=40 * len(rows))
