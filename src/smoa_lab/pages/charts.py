"""How every chart looks (one color for each method, lines that differ in gray too), and charts as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.basics.files import write_whole

METHODS = {
    "smoa": ("SMoA", "#0072b2"),
    "melora": ("MELoRA", "#4bd2b4"),
    "lora": ("LoRA", "#d55e00"),
    "rslora": ("rsLoRA", "#f0a500"),
    "dora": ("DoRA", "#b45a87"),
    "pissa": ("PiSSA", "#87a54b"),
    "hira": ("HiRA", "#a51eff"),
    "gralora": ("GraLoRA", "#f00fd2"),
    "loha": ("LoHa", "#5a96ff"),
    "adalora": ("AdaLoRA", "#c3c387"),
    "osf": ("OSF", "#a5c3ff"),
    "shira": ("SHiRA", "#690fb4"),
    "miss": ("MiSS", "#870078"),
    "full": ("full fine-tuning", "#87785a"),
}
"""What pictures call the methods, and their colors. Any two stay apart for readers without one kind of cones, and on
light and dark paper."""

MUTED = "#909498"
"""What is not in the foreground, and methods without a color of their own, which differ in their lines."""

INK = "currentColor"
"""Text and axes: the color of the page's text, black in a file."""

PAPER = "white"
"""The inside of hollow marks: the color of the page's paper, white in a file."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
"""The lines and points of several entries, in their order: they differ in gray too."""

WIDTH = 620
"""Pixels of a chart."""

LINE = 22
"""Pixels of an entry in a forest."""

HELD_OUT = "held-out rows"
KINDS = {"training": "loss", "validation": "eval_loss"}
"""What a picture calls the losses that a trainer logs."""


def name_of(method: str) -> str:
    """What pictures call the method."""
    return METHODS.get(method, (method, MUTED))[0]


def color_of(method: str) -> str:
    """The method's color."""
    return METHODS.get(method, (method, MUTED))[1]


LINE_LEGEND = alt.Legend(
    title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2, symbolOpacity=1, symbolSize=300
)


def colors(methods: Mapping[str, str], field: str = "entry", legend: alt.Legend | None = None) -> Any:
    """The encoding of ``field``, whose values are the keys, by the color of each one's method."""
    return _encoding(alt.Color, field, {entry: color_of(method) for entry, method in methods.items()}, legend)


def dashes(methods: Iterable[str], field: str = "entry", legend: alt.Legend | None = None) -> Any:
    """The encoding of ``field`` by line, to go with :func:`colors`, and in one legend with it."""
    return _encoding(alt.StrokeDash, field, dict(zip(methods, cycle(DASHES), strict=False)), legend)


def shapes(methods: Iterable[str], field: str = "entry", legend: alt.Legend | None = None) -> Any:
    """The encoding of ``field`` by the shape of a point, as :func:`dashes`."""
    return _encoding(alt.Shape, field, dict(zip(methods, cycle(SHAPES), strict=False)), legend)


def _encoding(channel: Any, field: str, looks: Mapping[str, Any], legend: alt.Legend | None) -> Any:
    return channel(f"{field}:N", scale=alt.Scale(domain=list(looks), range=list(looks.values())), legend=legend)


def values(rows: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as a chart takes them."""
    return alt.InlineData(values=[dict(row) for row in rows])


@alt.theme.register("smoa", enable=True)
def _look() -> alt.theme.ThemeConfig:
    axis = {"labelColor": INK, "titleColor": INK, "domainColor": MUTED, "tickColor": MUTED, "gridColor": MUTED}
    title = {"color": INK, "anchor": "start", "fontSize": 12, "offset": 4, "subtitleColor": INK, "subtitleFontSize": 11}
    looks: Any = {
        "font": "Arial, Helvetica, sans-serif",
        "padding": 10,
        "axis": {**axis, "gridOpacity": 0.25, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12},
        "title": title,
        "text": {"color": INK, "fontSize": 11},
        "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
        "header": {"labelColor": INK, "titleColor": INK, "labelFontWeight": "bold", "labelAnchor": "start"},
        "view": {"stroke": None},
        "line": {"strokeWidth": 2},
        "concat": {"spacing": 14},
    }
    return {"config": looks}


def forest(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A line for each of ``rows``, which have entry, method, low, mean, high, difference and verdict in words, and
    clear (whether the point is filled). ``title`` is the axis'."""
    bold = alt.ExprRef("test(/default/, datum.label) ? 'bold' : 'normal'")
    axis = alt.Axis(ticks=False, domain=False, labelLimit=400, labelFontWeight=bold)
    shown = alt.Chart(values(rows)).encode(y=alt.Y("entry:N", sort=None, title=None, axis=axis))
    methods = {row["entry"]: row["method"] for row in rows}
    colored = shown.encode(color=colors(methods))
    x = alt.X("low:Q", title=title, axis=alt.Axis(labelFlush=False, tickCount=6))
    point = colored.encode(x="mean:Q")
    words = shown.mark_text(align="left", fontSize=11)
    room, written = WIDTH - 260, max(158, *(6 * len(row["difference"]) for row in rows))
    return alt.layer(
        alt.Chart(values([{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x="zero:Q"),
        colored.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q"),
        point.mark_point(size=70, strokeWidth=2, fill=PAPER, opacity=1),
        point.transform_filter("datum.clear").mark_circle(size=90, opacity=1),
        words.encode(x=alt.value(room + 12), text="difference:N"),
        words.encode(x=alt.value(room + 12 + written), text="verdict:N"),
    ).properties(width=room, height=LINE * len(rows))


def losses(
    history: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Mapping[str, Any]],
    method: str,
    training: Mapping[str, Any] | None = None,
) -> Any | None:
    """The trainer's loss by step, each line named at its end; of held-out rows a point before and after, unless the
    trainer's loss is another one: of a choice with what ends it. None where nothing was logged."""
    points = [
        {"step": entry["step"], "loss": entry[key], "data": kind}
        for kind, key in KINDS.items()
        for entry in history
        if entry.get(key) is not None  # as of a run that diverged
    ]
    if not points:
        return None
    last = (training or {}).get("best_step") or history[-1]["step"]
    is_other = "accuracy" in evaluation.get("after", {})
    stages = {} if is_other else {"before": 0, "after": last}
    known = ((step, evaluation.get(stage, {}).get("loss")) for stage, step in stages.items())
    held_out = [{"step": step, "loss": loss, "data": HELD_OUT} for step, loss in known if loss is not None]
    shades = alt.Scale(domain=[*KINDS, HELD_OUT], range=[color_of(method), MUTED, INK])
    chart = alt.Chart(values(points)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("loss:Q", title="loss on trained tokens (nats per token)", scale=alt.Scale(zero=False)),
        color=alt.Color("data:N", scale=shades, legend=None),
    )
    names = {point["data"]: point for point in [*points, *reversed(held_out)]}.values()
    return alt.layer(
        chart.mark_line(point=alt.OverlayMarkDef(size=24)),
        chart.properties(data=values(held_out)).mark_point(shape="diamond", size=90, filled=True, opacity=1),
        chart.properties(data=values(names)).mark_text(align="left", dx=8).encode(text="data:N"),
    ).properties(width=WIDTH - 80, height=230)


def save_picture(chart: Any, file: Path) -> None:
    """Write the chart as a PNG, on white, at twice its size."""
    picture = BytesIO()
    chart.save(picture, format="png", scale_factor=2)
    write_whole(file, picture.getvalue())
