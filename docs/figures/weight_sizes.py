"""Measures and draws docs/images/weight_sizes.png: the rms of the weights that SMoA adapts.

    python docs/figures/weight_sizes.py [hub id, folder, or gemma3-270m]

The numbers are written to docs/images/weight_sizes.json. At equal alpha / r, a step of SMoA changes a weight by rms(W)
times as much as a step of LoRA. For equal steps alpha has to be 1/rms(W) times as large.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import altair as alt
from torch import nn

from smoa_lab.config.run import ModelSection
from smoa_lab.models.base_models import load_base_model
from smoa_lab.pages.charts import DASHES, PALETTE, lines, save_picture

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


def draw(sizes: dict[str, list[float]]) -> None:
    rows = [{"name": name, "layer": i, "rms": rms} for name, found in sizes.items() for i, rms in enumerate(found)]
    shades = (PALETTE[method] for method in ("smoa", "lora", "hira", "pissa", "full"))
    styles = {name: (shade, DASHES[0]) for name, shade in zip(sizes, shades, strict=True)}
    x = alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False))
    save_picture(lines(rows, styles, x, alt.Y("rms:Q", title="rms(W)"), width=460), IMAGES / "weight_sizes.png")


def main(name: str = "gemma3-270m") -> None:
    sizes = weight_sizes(name)
    (IMAGES / "weight_sizes.json").write_text(json.dumps({"model": name, "rms": sizes}, indent=1) + "\n")
    draw(sizes)
    every = [value for values in sizes.values() for value in values]
    print(f"{name}: rms(W) from {min(every):.4f} to {max(every):.4f} over {len(every)} weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
