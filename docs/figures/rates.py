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

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smoa_lab.drawing.plots import save_figure
from smoa_lab.study.trials import TrialStore

DOCS = Path(__file__).parents[1]
NUMBERS = DOCS / "images" / "rates.json"
PAGE = DOCS / "migration.md"
START, END = "<!-- rates: written by docs/figures/rates.py -->\n", "<!-- end of rates -->"
STYLES = {
    "LoRA": ("o-", "0.0"),
    "SMoA, 3 / rms": ("s:", "0.6"),
    "SMoA, 4 / rms": ("D--", "0.35"),
    "SMoA at LoRA's r": ("^-.", "0.6"),
}
TICKS = (1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)
HIGHEST = 0.3
"""Losses so far above the lowest of a panel are left out of the picture."""


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


def draw_pair(axes: Axes, title: str, entries: dict[str, dict[float, float]]) -> None:
    lowest = min(min(points.values()) for points in entries.values())
    for entry, points in entries.items():
        shown = {rate: loss for rate, loss in sorted(points.items()) if loss < lowest + HIGHEST}
        style, shade = STYLES[entry]
        axes.plot(list(shown), list(shown.values()), style, color=shade, label=entry, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss\n(nats per token)")
    axes.grid(True, color="0.92")


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
    figure = Figure(figsize=(8, 2.6 * -(-len(pairs) // 2)), dpi=130, layout="constrained")
    panels = figure.subplots(-(-len(pairs) // 2), 2, squeeze=False).flat
    for axes, pair in zip(panels, pairs, strict=False):
        draw_pair(axes, pair, losses(rows, pair))
    for axes in list(panels):
        axes.set_axis_off()
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    save_figure(figure, DOCS / "images" / "rates.png")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    PAGE.write_text(before + START + table(rows) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
