"""Measures and draws docs/images/precision.png: how much of ΔW bfloat16 keeps in the output.

    python docs/figures/precision.py

The numbers are written to docs/images/precision.json. ΔW = W ⊙ δ is relative to W. If W(1 + δ) is rounded to bfloat16,
an entry with |δ| < 2⁻⁹ does not change. A ΔW that is rounded apart from W loses almost nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import altair as alt
import torch

from smoa_lab.pages.charts import MUTED, OTHER, SMOA, lines, save_picture, values

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


def draw(points: list[dict[str, float]]) -> None:
    names = {"together": "W + ΔW rounded to bfloat16", "apart": "ΔW rounded by itself"}
    rows = [{"name": name, "size": one["size"], "error": one[key]} for key, name in names.items() for one in points]
    x = alt.X(
        "size:Q",
        title="rms of the relative change of an entry of W",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(format="~e", tickCount=4),
    )
    y = alt.Y(
        "error:Q", title="relative error of x ΔWᵀ", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=4)
    )
    drawn = lines(rows, dict(zip(names.values(), (OTHER, SMOA), strict=True)), x, y, width=460)
    ulp = alt.Chart(values([{"size": 2**-9, "told": "half a unit in the last place: 1/512", "error": 1.5e-3}])).encode(
        x="size:Q"
    )
    rule = ulp.mark_rule(color=MUTED, strokeDash=[2, 3])
    label = ulp.mark_text(align="left", dx=6, dy=14).encode(y=alt.value(120), text="told:N")
    save_picture(drawn + rule + label, IMAGES / "precision.png")


def main() -> None:
    points = [relative_errors(size) for size in RELATIVE_SIZES]
    (IMAGES / "precision.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    draw(points)
    for point in points:
        print(f"rms δ = {point['size']:g}: together {point['together']:.4f}, apart {point['apart']:.4f}")


if __name__ == "__main__":
    main()
