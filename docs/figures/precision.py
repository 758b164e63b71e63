"""Measures and draws docs/images/precision.png: how much of ΔW bfloat16 keeps in the output.

    python docs/figures/precision.py

The numbers are written to docs/images/precision.json. ΔW = W ⊙ δ is relative to W. If W(1 + δ) is rounded to bfloat16,
an entry with |δ| < 2⁻⁹ does not change. A ΔW that is rounded apart from W loses almost nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "images"
SIZE, TOKENS, WEIGHT_RMS = 1024, 256, 0.02
RELATIVE_SIZES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def relative_errors(size: float) -> dict[str, float]:
    """‖error of x ΔWᵀ‖ / ‖x ΔWᵀ‖ for entries δ of rms `size`, formed together with W and apart from it."""
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE).mul_(WEIGHT_RMS).bfloat16().double()
    delta = weight * torch.randn(SIZE, SIZE).double() * size
    x = torch.randn(TOKENS, SIZE).double()
    exact = x @ delta.T
    together = x @ ((weight + delta).bfloat16().double() - weight).T
    apart = x @ delta.bfloat16().double().T
    return {"size": size} | {
        name: float((found - exact).norm() / exact.norm()) for name, found in (("together", together), ("apart", apart))
    }


def main() -> None:
    points = [relative_errors(size) for size in RELATIVE_SIZES]
    (IMAGES / "precision.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    sizes = [point["size"] for point in points]
    axes.loglog(sizes, [point["together"] for point in points], "o-", color="0.15", label="W + ΔW rounded to bfloat16")
    axes.loglog(sizes, [point["apart"] for point in points], "^--", color="0.45", label="ΔW rounded by itself")
    axes.axvline(2**-9, color="0.6", linestyle=":", label="half a unit in the last place, 2⁻⁹")
    axes.set_xlabel("rms of δ, where ΔW = W ⊙ δ")
    axes.set_ylabel("relative error of x ΔWᵀ")
    axes.grid(True, color="0.92")
    axes.legend(fontsize=8, loc="center left")
    figure.savefig(IMAGES / "precision.png")
    for point in points:
        print(f"rms δ = {point['size']:g}: together {point['together']:.4f}, apart {point['apart']:.4f}")


if __name__ == "__main__":
    main()
