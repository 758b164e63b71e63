"""The HTML page about one or more adapters: coverage of W's spectrum, ranks and norms, some layers in detail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from smoa.errors import ConfigError
from smoa_lab.drawing.pages import figure, page, paragraph, section, table
from smoa_lab.drawing.plots import new_figure
from smoa_lab.inspection.layer_reports import LayerReport

Reports = Mapping[str, Sequence[LayerReport]]

STYLES = ("-", "--", ":", "-.")
BINS = 100
HEADER = (
    "layer",
    "shape",
    "trained",
    "‖ΔW‖/‖W‖",
    "‖ΔW‖₂/‖W‖₂",
    "rank",
    "bound",
    "effective rank",
    "stable rank",
    "coverage",
)


def inspection_page(title: str, adapters: Reports, layers: Sequence[str] = ()) -> str:
    """The HTML of one or more adapters by name. Of the first one the layer that changed most is shown in detail, and so
    is every layer whose name contains one of ``layers``.

    Raises:
        ConfigError: one of ``layers`` is in no layer's name.
    """
    first = next(iter(adapters.values()))
    changed = max(first, key=lambda report: report.relative_update)
    chosen = [report for report in _matching(first, layers) if report is not changed]
    parts = [
        paragraph(
            "W = U diag(σ) Vᵀ is a frozen weight, ΔW what the adapter adds. Coverage is how far down W's spectrum ΔW "
            "reaches: the mean of j/q under the energy of ΔW on W's singular directions j = 0 … q−1, largest first. "
            "0 is an update along the leading directions alone, 0.5 one that treats all alike."
        ),
        section("Coverage of the spectrum", figure(_coverage(adapters), _coverage_caption(adapters))),
        section("Layer by layer", figure(_layers(adapters), "Relative size and effective rank of ΔW, by layer.")),
        section(f"What changed most: {changed.module}", *_detail(changed)),
        *(section(report.module, *_detail(report)) for report in chosen),
        *(_layer_table(name, reports) for name, reports in adapters.items()),
    ]
    return page(title, *parts)


def _matching(reports: Sequence[LayerReport], layers: Sequence[str]) -> list[LayerReport]:
    for wanted in layers:
        if not any(wanted in report.module for report in reports):
            raise ConfigError(
                f"--layer {wanted}: no adapted layer's name contains it; layers are named like {reports[0].module}"
            )
    return [report for report in reports if any(wanted in report.module for wanted in layers)]


def summary(reports: Sequence[LayerReport]) -> dict[str, float]:
    """Means over the layers, and the number of trained values."""
    count = len(reports)
    return {
        "parameters": sum(report.parameters for report in reports),
        "relative_update": sum(report.relative_update for report in reports) / count,
        "rank": sum(report.rank for report in reports) / count,
        "effective_rank": sum(report.effective_rank for report in reports) / count,
        "coverage": sum(report.coverage for report in reports) / count,
    }


def _coverage_caption(adapters: Reports) -> str:
    told = [
        f"{name}: mean coverage {found['coverage']:.3f}, mean rank {found['rank']:.0f}, {found['parameters']:,} trained"
        for name, found in ((name, summary(reports)) for name, reports in adapters.items())
    ]
    return (
        "Share of ΔW's energy on the leading part of W's singular directions, mean of all layers; "
        f"the diagonal treats all directions alike. {'; '.join(told)}."
    )


def _coverage(adapters: Reports) -> Any:
    drawn, axes = _figure(1)
    for (name, reports), style in zip(adapters.items(), cycle(STYLES), strict=False):
        curves = torch.stack([_cumulative(report) for report in reports])
        places = torch.linspace(0, 1, BINS + 1)
        axes.plot(places, curves.mean(0), style, color="#000000", label=name)
    axes.plot([0, 1], [0, 1], color="#808080", linewidth=0.8)
    axes.set_xlabel("part of W's singular directions, largest first (j / q)")
    axes.set_ylabel("share of ΔW's energy")
    axes.legend(frameon=False)
    return drawn


def _cumulative(report: LayerReport) -> Tensor:
    """(BINS + 1,) cumulative energy, input and output side together, on a grid of j / q."""
    energy = (report.spectrum.input_energy + report.spectrum.output_energy) / 2
    cumulative = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    places = torch.linspace(0, len(energy), BINS + 1).round().long()
    return cumulative[places]


def _layers(adapters: Reports) -> Any:
    drawn, (sizes, ranks) = _figure(2)
    for (name, reports), style, marker in zip(adapters.items(), cycle(STYLES), cycle("os^v"), strict=False):
        number = range(len(reports))
        options = {"marker": marker, "markersize": 3, "linewidth": 0.8, "color": "#000000", "label": name}
        sizes.plot(number, [report.relative_update for report in reports], style, **options)
        ranks.plot(number, [report.effective_rank for report in reports], style, **options)
    sizes.set_ylabel("‖ΔW‖ / ‖W‖")
    ranks.set_ylabel("effective rank of ΔW")
    ranks.set_xlabel("adapted layer, in the model's order")
    sizes.legend(frameon=False)
    return drawn


def _detail(report: LayerReport) -> list[str]:
    drawn, (values, energy) = _figure(2)
    spectrum = report.spectrum
    values.semilogy(spectrum.weight_values.clamp_min(1e-12), color="#000000", label="W")
    floor = float(spectrum.update_values.max()) * 1e-8
    values.semilogy(spectrum.update_values.clamp_min(floor), "--", color="#000000", label="ΔW")
    values.set_ylabel("singular value")
    _draw_bands(values, report)
    values.legend(frameon=False)
    energy.plot(spectrum.input_energy, linewidth=0.8, color="#000000", label="input side")
    energy.plot(spectrum.output_energy, ":", linewidth=1.2, color="#808080", label="output side")
    energy.set_ylabel("share of ΔW's energy")
    energy.set_xlabel("singular direction j, largest first")
    energy.legend(frameon=False)
    caption = (
        f"Singular values of W and ΔW, and ΔW's energy along W's directions ({report.rows}×{report.columns}; "
        f"rank of ΔW {report.rank}, effective {report.effective_rank:.1f})."
    )
    if report.bands:
        caption += " Bars: the spectral scores (mean direction) of each block's coordinates, lowest to highest."
    return [figure(drawn, caption), *_blocks(report)]


def _draw_bands(axes: Any, report: LayerReport) -> None:
    """One bar a block along the directions, inside the upper half of the plot."""
    place = axes.get_xaxis_transform()
    for block, (low, high) in enumerate(report.bands):
        height = 0.95 - 0.5 * block / len(report.bands)
        axes.plot([low, high], [height, height], transform=place, color="#808080", linewidth=3)
        axes.text(high, height, f" {block}", transform=place, fontsize=7, va="center", color="#808080")


def _blocks(report: LayerReport) -> list[str]:
    """Which coordinates fall in which block; nothing for other methods."""
    if report.row_blocks is None or report.col_blocks is None:
        return []
    drawn, axes = _figure(2)
    for plot, blocks, side in zip(axes, (report.row_blocks, report.col_blocks), ("output", "input"), strict=True):
        plot.plot(blocks, "|", color="#000000", markersize=5, alpha=0.5)
        plot.set_ylabel(f"block of {side}")
        plot.set_xlabel(f"{side} coordinate")
        plot.set_yticks(range(int(blocks.max()) + 1))
    caption = "Block of every output and every input coordinate; block 0 lives on the leading singular directions."
    return [figure(drawn, caption)]


def _layer_table(name: str, reports: Sequence[LayerReport]) -> str:
    rows = [
        (
            report.module,
            (f"{report.rows}×{report.columns}", report.rows * report.columns),
            (f"{report.parameters:,}", report.parameters),
            f"{report.relative_update:.4f}",
            (f"{'! ' * report.moved_too_far}{report.relative_spectral_norm:.4f}", report.relative_spectral_norm),
            report.rank,
            "–" if report.rank_bound is None else report.rank_bound,
            f"{report.effective_rank:.1f}",
            f"{report.stable_rank:.1f}",
            f"{report.coverage:.3f}",
        )
        for report in reports
    ]
    return section(name, table(f"Every adapted layer of {name}; choose a heading to sort.", HEADER, rows))


def _figure(rows: int) -> tuple[Any, Any]:
    drawn, axes = new_figure(1.2 + 2.3 * rows, rows)
    for one in [axes] if rows == 1 else axes:
        one.grid(True, color="#808080", alpha=0.25)
    return drawn, axes
