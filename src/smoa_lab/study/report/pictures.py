"""Pictures of a study, readable in gray: lines differ in style and marker, not only in color."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from smoa_lab.drawing.plots import new_figure, save_figure
from smoa_lab.study.report.statistics import Difference

MARKERS = "osD^v<>PX*hpd"  # so many that they repeat in no step with lines and shades
STYLES = ("-", "--", "-.", ":")


def draw_searches(searches: Mapping[str, Mapping[float, float | None]], file: Path) -> None:
    """Validation loss against the learning rate, one line an entry; a diverged run leaves a gap."""
    figure, axes = new_figure(height=5.0)
    for (name, losses), marker, style, shade in zip(
        searches.items(), cycle(MARKERS), cycle(STYLES), cycle(("0", "0.3", "0.55")), strict=False
    ):
        rates = sorted(losses)
        values = [float("nan") if losses[rate] is None else losses[rate] for rate in rates]
        axes.plot(rates, values, linestyle=style, marker=marker, color=shade, label=name, markersize=5)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss of gold answers (nats per token)")
    axes.grid(True, color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    save_figure(figure, file)


def draw_differences(differences: Mapping[str, Difference], reference: str, file: Path) -> None:
    """Each entry's test loss minus the reference's with its interval; left of the line is better."""
    figure, axes = new_figure(height=1.2 + 0.35 * max(1, len(differences)))
    for place, found in enumerate(differences.values()):
        clear = found.verdict in ("better", "worse")
        axes.plot([found.low, found.high], [place, place], color="0.2", linewidth=2 if clear else 1)
        axes.plot(found.mean, place, "o", color="0.2", markerfacecolor="0.2" if clear else "white")
    axes.axvline(0, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.invert_yaxis()
    axes.set_xlabel(
        f"test loss minus that of {reference} (nats per token)\nleft is better; filled: the interval leaves out 0"
    )
    axes.grid(True, axis="x", color="0.9")
    save_figure(figure, file)
