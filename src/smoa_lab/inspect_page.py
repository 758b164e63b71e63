"""The HTML page about one or more adapters, with charts: how far they moved each layer, which directions and blocks,
and ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import torch

from smoa_lab.inspect import TOO_FAR, LayerReport, layer_table
from smoa_lab.pages.charts import INK, LINE_LEGEND, MUTED, PANEL, WIDTH, color_of, colors, dashes, tooltip, values
from smoa_lab.pages.templates import Figure, page

Reports = Mapping[str, Sequence[LayerReport]]
BINS = 100
COLUMNS = 4
POINTS = 256
"""A spectrum of more values is drawn by so many of them."""
INTRODUCTION = (
    "W = U diag(σ) Vᵀ is a frozen weight, ΔW what the adapter adds. Coverage is how far down W's spectrum ΔW reaches: "
    "the mean of j/q under the energy of ΔW on W's singular directions j = 0 … q−1, largest first. 0 is an update "
    "along the leading directions alone, 0.5 one that treats all alike."
)
FAR = f"‖ΔW‖₂/‖W‖₂: from {TOO_FAR['relative_spectral_norm']} on much is likely to be forgotten."
COVERAGE = (
    "Share of ΔW's energy on the leading part of W's singular directions, mean of all layers; the diagonal treats all "
    "directions alike."
)
BLOCKS = "Small is a layer, large the mean of all layers. The scale s is what B A ⊙ W of the block is multiplied with."


def inspection_page(title: str, adapters: Reports) -> str:
    """The HTML of one or more adapters by name. Of the first one the layer that changed most is shown in detail."""
    changed = max(next(iter(adapters.values())), key=lambda report: report.relative_update)
    means = []
    for name, reports in adapters.items():
        mean = sum(report.coverage for report in reports) / len(reports)
        rank = sum(report.rank for report in reports) / len(reports)
        trained = sum(report.parameters for report in reports)
        means.append(f"{name}: mean coverage {mean:.3f}, mean rank {rank:.0f}, {trained:,} trained")
    moved = by_layer(adapters, "relative_spectral_norm", "‖ΔW‖₂ / ‖W‖₂")
    blocks, ranks = by_block(adapters), by_layer(adapters, "effective_rank", "effective rank of ΔW")
    figures = {
        "How far each layer was moved": Figure(moved, FAR),
        "Coverage of the spectrum": Figure(coverage(adapters), f"{COVERAGE} {'; '.join(means)}."),
        "Block by block": None if blocks is None else Figure(blocks, BLOCKS),
        "Rank": Figure(ranks, "Effective rank of ΔW."),
        f"What changed most: {changed.module}": _detail(changed),
    }
    note = "Every adapted layer of {}; choose a heading to sort. ! marks a layer that was moved far."
    sections: list[tuple[str, list[Any]]] = [
        *((heading, [figure]) for heading, figure in figures.items() if figure is not None),
        *((name, [layer_table(reports, note.format(name))]) for name, reports in adapters.items()),
    ]
    return page(title, sections, [INTRODUCTION])


def _detail(report: LayerReport) -> Figure:
    caption = (
        f"Singular values of W and ΔW, and ΔW's energy along W's directions, mean of both sides ({report.rows}×"
        f"{report.columns}; rank of ΔW {report.rank}, effective {report.effective_rank:.1f})."
    )
    if report.bands:
        caption += " Bars: the spectral scores (mean direction) of each block's coordinates, lowest to highest."
    return Figure(spectrum(report, color_of(report.method)), caption)


def _looks(adapters: Reports) -> tuple[alt.Color, alt.StrokeDash]:
    """Color and line of each adapter, with a legend where there are several."""
    methods = {name: reports[0].method for name, reports in adapters.items()}
    legend = LINE_LEGEND if len(adapters) > 1 else None
    return colors(methods, "adapter", legend), dashes(methods, "adapter", legend)


def by_layer(adapters: Reports, field: str, title: str) -> Any:
    """A panel for each kind of module, such as q_proj: ``field`` of the reports along the model's layers, a line for
    each adapter."""
    rows = [
        {"adapter": name, "module": report.module, field: getattr(report, field), **place(report.module)}
        for name, reports in adapters.items()
        for report in reports
    ]
    color, dash = _looks(adapters)
    panels = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shown = alt.Chart(values(row for row in rows if row["kind"] == kind)).encode(
            x=alt.X("layer:Q", title="layer", axis=alt.Axis(format="d", tickMinStep=1, grid=False)),
            y=alt.Y(f"{field}:Q", title=None, axis=alt.Axis(tickCount=4)),
            color=color,
            tooltip=tooltip(adapter="", module="", **{field: ".4f"}),
        )
        curve = shown.mark_line(strokeWidth=1.5).encode(strokeDash=dash)
        drawn = alt.layer(curve, shown.mark_circle(size=24, opacity=1))
        panels.append(drawn.properties(width=PANEL, height=PANEL * 0.8, title=kind))
    return alt.concat(*panels, columns=COLUMNS, title=alt.Title(f"{title}, by layer", fontWeight="normal", offset=12))


def place(module: str) -> dict[str, Any]:
    """The layer's number and the kind of the module: its name without numbers, from the last dot on."""
    number = re.search(r"\.(\d+)\.", f".{module}.")
    return {"layer": int(number[1]) if number else 0, "kind": module.rpartition(".")[2]}


def by_block(adapters: Reports) -> Any | None:
    """Coverage and scale of every block: a dot for each layer, and the mean of all layers. None without blocks."""
    adapters = {name: reports for name, reports in adapters.items() if reports[0].block_scales}
    rows = [
        {
            "adapter": adapter,
            "module": report.module,
            "block": block + 1,
            "coverage": report.block_coverages[block],
            "scale": scale,
        }
        for adapter, reports in adapters.items()
        for report in reports
        for block, scale in enumerate(report.block_scales)
    ]
    if not rows:
        return None
    axis = alt.X("block:O", title="block (of spectral ones: leading directions first)", axis=alt.Axis(labelAngle=0))
    color, _ = _looks(adapters)
    shown = alt.Chart(values(rows)).encode(x=axis, xOffset=alt.XOffset("adapter:N", sort=None), color=color)
    panels = []
    for field, title, scale in (
        ("coverage", "coverage of ΔW's block", alt.Scale(zero=True)),
        ("scale", "scale s of the block", alt.Scale(type="log", nice=False)),
    ):
        layers = shown.mark_point(size=12).encode(
            y=alt.Y(f"{field}:Q", title=title, scale=scale),
            tooltip=tooltip(adapter="", module="", block="d", **{field: ".4g"}),
        )
        mean = shown.mark_point(size=90, strokeWidth=3).encode(y=f"mean({field}):Q")
        panels.append(alt.layer(layers, mean).properties(width=WIDTH / 2 - 60, height=220))
    return alt.hconcat(*panels)


def coverage(adapters: Reports) -> Any:
    """Share of ΔW's energy on the leading part of W's singular directions, mean of all layers; the diagonal treats all
    directions alike."""
    rows = []
    for adapter, reports in adapters.items():
        curves = []
        for report in reports:
            energy = (report.input_energy + report.output_energy) / 2
            cumulative = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
            curves.append(cumulative[torch.linspace(0, len(energy), BINS + 1).round().long()])
        shares = torch.stack(curves).mean(0).tolist()
        rows += [{"adapter": adapter, "part": i / BINS, "share": share} for i, share in enumerate(shares)]
    shown = alt.Chart(values(rows)).encode(
        x=alt.X("part:Q", title="part of W's singular directions, largest first (j / q)"),
        y=alt.Y("share:Q", title="share of ΔW's energy"),
        tooltip=tooltip(adapter="", part=".2f", share=".3f"),
    )
    even = alt.Chart(values([{"part": 0, "share": 0}, {"part": 1, "share": 1}])).encode(x="part:Q", y="share:Q")
    color, dash = _looks(adapters)
    return alt.layer(
        even.mark_line(color=MUTED, strokeWidth=1, strokeDash=[4, 3]),
        shown.mark_line().encode(color=color, strokeDash=dash),
    ).properties(width=WIDTH - 60, height=240)


def spectrum(report: LayerReport, color: str) -> Any:
    """The singular values of W and ΔW, the bands of the blocks' scores, and ΔW's energy along W's directions."""
    floor = float(report.update_values.max()) * 1e-8 or 1e-12
    rows = [
        {
            "direction": j,
            "W": max(float(report.weight_values[j]), 1e-12),
            "ΔW": max(float(report.update_values[j]), floor),
            "energy": float(report.input_energy[j] + report.output_energy[j]) / 2,
        }
        for j in torch.linspace(0, len(report.weight_values) - 1, POINTS).long().unique().tolist()
    ]
    domain = alt.Scale(domain=[0, len(report.weight_values)], nice=False)
    chart = alt.Chart(values(rows), width=WIDTH - 60).encode(x=alt.X("direction:Q", title=None, scale=domain))
    curves = []
    for name, shade in (("W", MUTED), ("ΔW", color)):
        axis = alt.Axis(format="~e", tickCount=4)
        y = alt.Y(f"{name}:Q", title="singular value", scale=alt.Scale(type="log"), axis=axis)
        line = chart.encode(y=y, tooltip=tooltip(direction="d", **{name: ".4g"})).mark_line(color=shade)
        label = chart.transform_filter("datum.direction == 0").encode(y=y)
        text = label.mark_text(align="left", dx=6, dy=-8, text=name, color=shade, fontWeight="bold")
        curves.append(alt.layer(line, text))
    energy = chart.mark_area(color=color, opacity=0.6, line={"color": color, "strokeWidth": 1}).encode(
        x=alt.X("direction:Q", title="singular direction j of W, largest first", scale=domain),
        y=alt.Y("energy:Q", title="share of ΔW's energy"),
        tooltip=tooltip(direction="d", energy=".5f"),
    )
    bands = []
    if report.bands:
        ends = [{"block": number, "low": low, "high": high} for number, (low, high) in enumerate(report.bands, start=1)]
        bars = alt.Chart(values(ends)).encode(
            x=alt.X("low:Q", title=None, scale=domain),
            x2="high:Q",
            y=alt.Y("block:O", title="block", axis=alt.Axis(grid=False, ticks=False, labelOverlap=True)),
            tooltip=tooltip(block="d", low=".1f", high=".1f"),
        )
        drawn = bars.mark_bar(color=INK, opacity=0.45, height=5)
        bands = [drawn.properties(width=WIDTH - 60, height=max(40, 12 * len(ends)))]
    return alt.vconcat(alt.layer(*curves).properties(height=180), *bands, energy.properties(height=110))
