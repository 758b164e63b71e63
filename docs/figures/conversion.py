"""Draws docs/images/conversion.png: what a LoRA of each rank keeps of a trained adapter.

Run with `make figures`. benchmarks/lora_conversion.py measures the numbers, in benchmarks/results/lora_conversion.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "lora_conversion.json"
PICTURE = ROOT / "docs" / "images" / "conversion.png"
DARK, MUTED = "0.15", "0.5"


def loss_by_rank(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Draw the LoRA's loss on the task, between the base model's and the adapter's."""
    ranks, losses = [point["rank"] for point in points], [point["loss"]["lora"] for point in points]
    bars = [point["loss"]["lora_change_stderr"] for point in points]
    axes.errorbar(ranks, losses, yerr=bars, fmt="o-", color=DARK, capsize=3, label="LoRA of that rank")
    axes.axhline(points[0]["loss"]["base"], color=MUTED, linestyle=":", label="base model")
    axes.axhline(points[0]["loss"]["adapter"], color=MUTED, linestyle="--", label="SMoA adapter")
    axes.set_xlabel("rank of the LoRA")
    axes.set_ylabel("loss on held-out answers (nats per token)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])


def error_by_size(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Draw ‖ΔW − BA‖ / ‖ΔW‖ against the stored numbers, as a LoRA and block by block."""
    errors = [point["error"] for point in points]
    for key, style, label in (("parameters", "o-", "LoRA"), ("blockwise_parameters", "^--", "same, stored by blocks")):
        axes.plot([point[key] for point in points], errors, style, color=DARK, label=label)
    for point in points:
        if point["rank"] in (1, 8, 64, 256):
            place = (point["parameters"], point["error"])
            axes.annotate(f"rank {point['rank']}", place, (6, 4), textcoords="offset points", fontsize=8)
    axes.plot([points[0]["adapter_parameters"]], [0], "*", color=DARK, markersize=13, label="SMoA adapter")
    axes.set_xlabel("stored numbers")
    axes.set_ylabel("‖ΔW − BA‖ / ‖ΔW‖, all layers")
    axes.set_xscale("log")
    axes.set_xlim(right=4 * points[-1]["parameters"])


def main() -> None:
    points = json.loads(RESULT.read_text())["points"]
    figure = Figure(figsize=(9.5, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    loss_by_rank(left, points)
    error_by_size(right, points)
    for axes in (left, right):
        axes.grid(True, color="0.92")
        axes.legend(fontsize=8)
    figure.savefig(PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
