"""Draws docs/images/rates.png and writes the table of docs/migration.md: the loss by learning rate, for LoRA and SMoA.

    python docs/figures/rates.py
    python docs/figures/rates.py --collect PAIR ENTRY FACTOR STUDY_FOLDER STUDY_ENTRY

The numbers are in docs/images/rates.json: validation losses of studies in quarter decades, one seed each. The
second form adds an entry of a study's folder to it; FACTOR is that of the scale, in units of 1 / rms of each block.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt

from smoa_lab.pages.charts import DASHES, LORA, PALETTE, SMOA, lines, save_picture
from smoa_lab.study.trials import TrialStore

DOCS = Path(__file__).parents[1]
NUMBERS = DOCS / "images" / "rates.json"
PAGE = DOCS / "migration.md"
START, END = "<!-- rates: written by docs/figures/rates.py -->\n", "<!-- end of rates -->"
STYLES = {
    "LoRA": LORA,
    "SMoA, 3 / rms": (PALETTE["smoa"], DASHES[1]),
    "SMoA, 4 / rms": SMOA,
    "SMoA at LoRA's r": (PALETTE["smoa"], DASHES[2]),
}
TICKS = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
HIGHEST, HIGHEST_SHARE = 0.45, 0.4
"""Losses so far above the lowest of a panel, or by that share of it, are left out of the picture."""


def read() -> list[dict[str, Any]]:
    """One entry for each pair of model and task, method and learning rate."""
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else []
    return found


def collect(pair: str, entry: str, factor: str, folder: str, study_entry: str) -> None:
    """Add the tuning runs of a study's entry."""
    store, rows = TrialStore(Path(folder)), read()
    for name in store.names(f"tuning/{study_entry}/"):
        run = store.find(name)
        assert run is not None
        scores, config = run["scores"]["all"], run["config"]
        rate = config["training"]["learning_rate"]
        rows = [row for row in rows if (row["pair"], row["entry"], row["learning_rate"]) != (pair, entry, rate)]
        rows.append(
            {
                "pair": pair,
                "entry": entry,
                "factor": float(factor) or None,
                "learning_rate": rate,
                "loss": round(scores["gold_loss"], 4),
                "accuracy": round(scores["accuracy"], 4),
                "questions": scores["questions"],
                "parameters": run["parameters"],
                "adapter": config["adapter"],
                "seed": config["training"]["seed"],
                "commit": run["provenance"]["commit"],
                "versions": {name: run["provenance"]["versions"][name] for name in ("smoa", "torch", "peft")},
            }
        )
    rows.sort(key=lambda row: (row["pair"], row["entry"], row["learning_rate"]))
    NUMBERS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def losses(rows: list[dict[str, Any]], pair: str) -> dict[str, dict[float, float]]:
    """Loss by learning rate, by entry."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["pair"] == pair:
            found.setdefault(row["entry"], {})[row["learning_rate"]] = row["loss"]
    return {entry: found[entry] for entry in STYLES if entry in found}


def panel(title: str, entries: dict[str, dict[float, float]]) -> Any:
    lowest = min(min(points.values()) for points in entries.values())
    rows = [
        {"name": entry, "learning_rate": rate, "loss": loss}
        for entry, points in entries.items()
        for rate, loss in sorted(points.items())
        if loss < lowest + min(HIGHEST, HIGHEST_SHARE * lowest)
    ]
    axis = alt.Axis(values=list(TICKS), format="~g", grid=False)
    x = alt.X(
        "learning_rate:Q",
        title="learning rate",
        axis=axis,
        scale=alt.Scale(type="log", domain=TICKS[:: len(TICKS) - 1]),
    )
    y = alt.Y("loss:Q", title="validation loss (nats per token)", scale=alt.Scale(zero=False))
    return lines(rows, STYLES, x, y).properties(title=title)


def table(rows: list[dict[str, Any]]) -> str:
    """Losses of each entry by rate, the best in bold."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for pair in dict.fromkeys(row["pair"] for row in rows):
        for entry, points in losses(rows, pair).items():
            best = min(points.values())
            cells = [
                ""
                if rate not in points
                else f"**{points[rate]:.3f}**"
                if points[rate] == best
                else f"{points[rate]:.3f}"
                for rate in rates
            ]
            lines.append(f"| {pair}: {entry} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--collect"]:
        collect(*sys.argv[2:])
        return
    rows = read()
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    picture = alt.concat(*(panel(pair, losses(rows, pair)) for pair in pairs), columns=2)
    save_picture(picture, DOCS / "images" / "rates.png")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    PAGE.write_text(before + START + table(rows) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
