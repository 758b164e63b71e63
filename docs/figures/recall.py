"""Draws docs/images/recall.png: how many random pairs each method recalls, from benchmarks/results/recall-*.

    python docs/figures/recall.py

The runs are those of benchmarks/recall.py, by an encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.pages.charts import DASHES, LORA, PALETTE, SMOA, lines, save_picture

DOCS = Path(__file__).parents[1]
NAMES = {
    "smoa-k8": "SMoA, K = 8",
    "smoa-k2": "SMoA, K = 2",
    "none-spectral-k8": "blocks without W, K = 8",
    "hira": "HiRA",
    "lora": "LoRA",
    "lora-r2": "LoRA, 2 times the parameters",
    "lora-r4": "LoRA, 4 times the parameters",
}
STYLES = {
    "smoa-k8": SMOA,
    "smoa-k2": (PALETTE["smoa"], DASHES[1]),
    "none-spectral-k8": (PALETTE["melora"], DASHES[2]),
    "hira": (PALETTE["hira"], DASHES[3]),
    "lora": LORA,
    "lora-r2": (PALETTE["lora"], DASHES[2]),
    "lora-r4": (PALETTE["lora"], DASHES[1]),
}


def rows(summaries: Iterable[Path]) -> list[dict[str, Any]]:
    """The share recalled by the entries of ``NAMES`` and by the number of pairs, which ends the folder's name."""
    found = [(int(path.parent.name.split("-")[-1]), json.loads(path.read_text(encoding="utf-8"))) for path in summaries]
    return [
        {"name": NAMES[one["entry"]], "pairs": pairs, "recalled": 100 * one["accuracy"]}
        for pairs, entries in sorted(found, key=lambda pair: pair[0])
        for one in entries
        if one["entry"] in NAMES
    ]


def main() -> None:
    drawn = rows(DOCS.parent.glob("benchmarks/results/recall-[0-9]*/summary.json"))
    ticks = sorted({row["pairs"] for row in drawn})
    axis = alt.Axis(values=ticks, format="d", title="random pairs to learn, 40 passes over them")
    x = alt.X("pairs:Q", axis=axis, scale=alt.Scale(type="log", nice=False))
    y = alt.Y("recalled:Q", title="recalled (%)", scale=alt.Scale(domain=[0, 100]))
    styles = {NAMES[entry]: style for entry, style in STYLES.items()}
    save_picture(lines(drawn, styles, x, y, width=420, height=260), DOCS / "images" / "recall.png")


if __name__ == "__main__":
    main()
