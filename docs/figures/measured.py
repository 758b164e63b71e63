"""Draws the pictures of single measurements in docs/images, each from a JSON beside it or of a benchmark.

    python docs/figures/measured.py [precision] [rates]

- precision: how much of an update reaches the output of a layer in bfloat16, by benchmarks/rounding.py.
- rates: the loss by learning rate, for LoRA and SMoA's default, and the table of studies/rates.md, which has other
  scales too; validation losses of studies in quarter decades, one seed each. `--collect` adds an entry of a study's
  folder to the numbers; FACTOR is that of the scale, in units of 1 / rms of each block.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.pages.charts import DASHES, LINE_LEGEND, MUTED, color_of, save_picture, values
from smoa_lab.pages.tables import Table

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
RATES = IMAGES / "rates.json"
ROUNDING = DOCS.parent / "benchmarks" / "results" / "rounding_kept.json"
SMOA, OTHER = (color_of("smoa"), DASHES[0]), (MUTED, DASHES[1])
"""A line's color and dash."""
RATE_LINES = {"LoRA": ("LoRA", (color_of("lora"), DASHES[1])), "SMoA, 4 / rms": ("SMoA (default)", SMOA)}
"""The entries that are drawn, their names there and their lines."""
TICKS = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
HIGHEST, HIGHEST_SHARE = 0.45, 0.4
"""Losses so far above the lowest of a panel, or by that share of it, are left out of the picture."""


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def lines(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, tuple[str, list[int]]], x: alt.X, y: alt.Y, width: int
) -> Any:
    """A line with points for each of ``names``, the values of ``name`` in the rows, in its color and dash."""
    domain, (shades, patterns) = [*names], zip(*names.values(), strict=True)
    color = alt.Color("name:N", scale=alt.Scale(domain=domain, range=[*shades]), legend=LINE_LEGEND)
    dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=domain, range=[*patterns]), legend=LINE_LEGEND)
    chart = alt.Chart(values(rows)).encode(x=x, y=y, color=color)
    drawn = alt.layer(chart.mark_line().encode(strokeDash=dash), chart.mark_circle(size=45, opacity=1))
    return drawn.properties(width=width, height=190)


def precision() -> Any:
    rows = [row for row in read(ROUNDING)["results"] if row["weights"] == "normal"]
    names = {"nearest": "one product, SMoA's", "lora": "two products, LoRA's"}
    points = [
        {"name": name, "share": row["share"], "kept": row[key]["kept"]} for key, name in names.items() for row in rows
    ]
    ticks = alt.Axis(format="~g", values=[10.0**power for power in range(-4, 0)], labelFlush=False)
    x = alt.X("share:Q", title="size of the update: Δy / y", scale=alt.Scale(type="log", nice=False), axis=ticks)
    y = alt.Y("kept:Q", title="share of the update in the output", scale=alt.Scale(domain=[0, 1]))
    return lines(points, dict(zip(names.values(), (SMOA, OTHER), strict=True)), x, y, width=460)


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
