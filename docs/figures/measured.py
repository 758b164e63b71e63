"""Draws the pictures of single measurements in docs/images, each from a JSON beside it or of a benchmark.

    python docs/figures/measured.py [precision] [rates]

- precision: how much of ΔW bfloat16 keeps in the output, measured here. ΔW = W ⊙ δ is relative to W. If W(1 + δ) is
  rounded to bfloat16, an entry with |δ| < 2⁻⁹ does not change. A ΔW that is rounded apart from W loses almost nothing.
- rates: the loss by learning rate, for LoRA and SMoA's default, and the table of studies/rates.md, which has other
  scales too; validation losses of studies in quarter decades, one seed each. `--collect` adds an entry of a study's
  folder to the numbers; FACTOR is that of the scale, in units of 1 / rms of each block.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import torch

from smoa_lab.pages.charts import DASHES, MUTED, color_of, lines, save_picture, values
from smoa_lab.pages.tables import Table

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
RATES = IMAGES / "rates.json"
SMOA, OTHER = (color_of("smoa"), DASHES[0]), (MUTED, DASHES[1])
"""A line's color and dash."""
RATE_LINES = {"LoRA": ("LoRA", (color_of("lora"), DASHES[1])), "SMoA, 4 / rms": ("SMoA (default)", SMOA)}
"""The entries that are drawn, their names there and their lines."""
TICKS = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
HIGHEST, HIGHEST_SHARE = 0.45, 0.4
"""Losses so far above the lowest of a panel, or by that share of it, are left out of the picture."""
SIZE, TOKENS, WEIGHT_RMS = 1024, 256, 0.02
RELATIVE_SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def relative_errors(size: float) -> dict[str, float]:
    """‖error of x ΔWᵀ‖ / ‖x ΔWᵀ‖ for entries δ of rms `size`, formed together with W and apart from it."""
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE).mul_(WEIGHT_RMS).bfloat16().double()
    delta = weight * torch.randn(SIZE, SIZE).double() * size
    x = torch.randn(TOKENS, SIZE).double()
    exact = x @ delta.T
    rounded = {
        "together": x @ ((weight + delta).bfloat16().double() - weight).T,
        "apart": x @ delta.bfloat16().double().T,
    }
    return {"size": size} | {name: float((product - exact).norm() / exact.norm()) for name, product in rounded.items()}


def precision() -> Any:
    points = [relative_errors(size) for size in RELATIVE_SIZES]
    (IMAGES / "precision.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    names = {"together": "W + ΔW rounded to bfloat16", "apart": "ΔW rounded by itself"}
    rows = [
        {"name": name, "size": point["size"], "error": point[key]} for key, name in names.items() for point in points
    ]
    across, up = (alt.Scale(type="log", nice=False) for _ in range(2))
    ticks = alt.Axis(format="~g", values=[10.0**power for power in range(-4, 1)], labelFlush=False)
    x = alt.X("size:Q", title="rms of the relative change of an entry of W", scale=across, axis=ticks)
    y = alt.Y("error:Q", title="relative error of x ΔWᵀ", scale=up, axis=ticks)
    drawn = lines(rows, dict(zip(names.values(), (OTHER, SMOA), strict=True)), x, y, width=460)
    ulp = alt.Chart(values([{"size": 2**-9, "label": "half a unit in the last place: 1/512"}])).encode(x="size:Q")
    label = ulp.mark_text(align="left", dx=6, dy=14).encode(y=alt.value(105), text="label:N")
    return drawn + ulp.mark_rule(color=MUTED, strokeDash=[2, 3]) + label


def rates() -> Any:
    pairs: dict[str, dict[str, dict[float, float]]] = {}
    for row in read(RATES):
        pairs.setdefault(row["pair"], {}).setdefault(row["entry"], {})[row["learning_rate"]] = row["loss"]
    page = DOCS.parent / "studies" / "rates.md"
    before, _, _ = page.read_text(encoding="utf-8").partition("|")
    every = sorted({rate for entries in pairs.values() for losses in entries.values() for rate in losses})
    lines = [
        [f"{pair}: {entry}", *(loss_text(losses, rate) for rate in every)]
        for pair, entries in pairs.items()
        for entry, losses in entries.items()
    ]
    table = Table(["entry", *(f"{rate:g}" for rate in every)], lines).markdown()
    page.write_text(f"{before}{table}\n", encoding="utf-8")
    return alt.concat(*(panel(*pair) for pair in pairs.items()), columns=3)


def loss_text(losses: dict[float, float], rate: float) -> str:
    """The loss at a rate, the best with a star; nothing where none was run."""
    return f"{losses[rate]:.3f}{' *' * (losses[rate] == min(losses.values()))}" if rate in losses else ""


def panel(title: str, entries: dict[str, dict[float, float]]) -> Any:
    shown = {name: entries[entry] for entry, (name, _) in RATE_LINES.items()}
    lowest = min(loss for points in shown.values() for loss in points.values())
    rows = [
        {"name": name, "learning_rate": rate, "loss": loss}
        for name, points in shown.items()
        for rate, loss in points.items()
        if loss < lowest + min(HIGHEST, HIGHEST_SHARE * lowest)
    ]
    axis = alt.Axis(values=list(TICKS), format="~g", grid=False, labelFlush=False)
    across = alt.Scale(type="log", domain=TICKS[:: len(TICKS) - 1])
    x = alt.X("learning_rate:Q", title="learning rate", axis=axis, scale=across)
    y = alt.Y("loss:Q", title="validation loss (nats per token)", scale=alt.Scale(zero=False))
    model, _, data = title.partition(", ")
    return lines(rows, dict(RATE_LINES.values()), x, y, width=220).properties(title=alt.Title(model, subtitle=data))


PICTURES: dict[str, Callable[[], Any]] = {
    "precision": precision,
    "rates": rates,
}


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        save_picture(PICTURES[name](), IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
