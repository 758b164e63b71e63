"""The HTML page about one or more adapters: how far they moved each layer, which directions and blocks, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.drawing.look import color_of
from smoa_lab.drawing.pages import figure, page, paragraph, section, table
from smoa_lab.inspection.inspection_charts import by_block, by_layer, coverage, methods_of, spectrum
from smoa_lab.inspection.layer_reports import TOO_FAR, LayerReport

Reports = Mapping[str, Sequence[LayerReport]]

HEADER = (
    *("layer", "shape", "trained", "‖ΔW‖/‖W‖", "‖ΔW‖₂/‖W‖₂", "rank", "bound"),
    *("effective rank", "stable rank", "coverage"),
)
INTRODUCTION = (
    "W = U diag(σ) Vᵀ is a frozen weight, ΔW what the adapter adds. Coverage is how far down W's spectrum ΔW reaches: "
    "the mean of j/q under the energy of ΔW on W's singular directions j = 0 … q−1, largest first. 0 is an update "
    "along the leading directions alone, 0.5 one that treats all alike."
)
FAR = f"‖ΔW‖₂/‖W‖₂: from {TOO_FAR['relative_spectral_norm']} on much is likely to be forgotten."
BLOCKS = (
    "A thin line for each layer, the mean of all layers in bold. The scale s is what B A ⊙ W of the block is "
    "multiplied with."
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
    blocks = by_block(adapters)
    parts = [
        paragraph(INTRODUCTION),
        section(
            "How far each layer was moved", figure(_lines(adapters, "relative_spectral_norm", "‖ΔW‖₂ / ‖W‖₂"), FAR)
        ),
        section("Coverage of the spectrum", figure(coverage(adapters), _coverage_caption(adapters))),
        *([] if blocks is None else [section("Block by block", figure(blocks, BLOCKS))]),
        section("Rank", figure(_lines(adapters, "effective_rank", "effective rank of ΔW"), "Effective rank of ΔW.")),
        section(f"What changed most: {changed.module}", _detail(changed)),
        *(section(report.module, _detail(report)) for report in chosen),
        *(_layer_table(name, reports) for name, reports in adapters.items()),
    ]
    return page(title, *parts)


def _lines(adapters: Reports, field: str, title: str) -> Any:
    rows = [
        {"adapter": name, "module": report.module, field: getattr(report, field)}
        for name, reports in adapters.items()
        for report in reports
    ]
    return by_layer(rows, methods_of(adapters), field, title)


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


def _detail(report: LayerReport) -> str:
    caption = (
        f"Singular values of W and ΔW, and ΔW's energy along W's directions, mean of both sides ({report.rows}×"
        f"{report.columns}; rank of ΔW {report.rank}, effective {report.effective_rank:.1f})."
    )
    if report.bands:
        caption += " Bars: the spectral scores (mean direction) of each block's coordinates, lowest to highest."
    return figure(spectrum(report, color_of(report.method)), caption)


def _layer_table(name: str, reports: Sequence[LayerReport]) -> str:
    rows = [
        (
            report.module,
            (f"{report.rows}×{report.columns}", report.rows * report.columns),
            (f"{report.parameters:,}", report.parameters),
            *((report.told(figure), getattr(report, figure)) for figure in TOO_FAR),
            report.rank,
            "–" if report.rank_bound is None else report.rank_bound,
            f"{report.effective_rank:.1f}",
            f"{report.stable_rank:.1f}",
            f"{report.coverage:.3f}",
        )
        for report in reports
    ]
    return section(
        name,
        table(
            f"Every adapted layer of {name}; choose a heading to sort. ! marks a layer that was moved far.",
            HEADER,
            rows,
        ),
    )
