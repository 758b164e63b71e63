"""Measures and draws docs/images/weight_sizes.png: the rms of the weights that SMoA adapts.

    python docs/figures/weight_sizes.py [hub id, folder, or gemma3-270m]

The numbers are written to docs/images/weight_sizes.json. At equal alpha / r, a step of SMoA changes a weight by rms(W)
times as much as a step of LoRA. For equal steps alpha has to be 1/rms(W) times as large.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from smoa_lab.config.run_config import ModelSection
from smoa_lab.models.base_models import load_base_model

IMAGES = Path(__file__).parents[1] / "images"
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def weight_sizes(name: str) -> dict[str, list[float]]:
    """rms of the weight in each layer, by name of the projection."""
    model, _ = load_base_model(ModelSection(name=name))
    sizes: dict[str, list[float]] = {target: [] for target in TARGETS}
    for path, module in model.named_modules():
        target = path.rpartition(".")[2]
        if target in sizes and isinstance(module, nn.Linear):
            sizes[target].append(float(module.weight.detach().double().square().mean().sqrt()))
    return sizes


def main(name: str = "gemma3-270m") -> None:
    sizes = weight_sizes(name)
    (IMAGES / "weight_sizes.json").write_text(json.dumps({"model": name, "rms": sizes}, indent=1) + "\n")
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (target, values), marker in zip(sizes.items(), "os^v*", strict=True):
        axes.plot(values, marker=marker, markersize=4, linewidth=1, label=target)
    axes.set_ylim(0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("rms(W)")
    axes.grid(True, color="0.92")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(IMAGES / "weight_sizes.png")
    every = [value for values in sizes.values() for value in values]
    print(f"{name}: rms(W) from {min(every):.4f} to {max(every):.4f} over {len(every)} weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
