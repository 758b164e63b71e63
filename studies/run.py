"""Runs studies of this folder, also those that have a runner of their own, where they stopped; or only reports them.

    python studies/run.py recall-256 [--only ENTRY ...]
    python studies/run.py --report-only            # every stored study anew, and pictures of docs/

`smoa compare studies/NAME/NAME.yaml` does the same for a study without a runner of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt
import phonebook
import results_page
import stored

from smoa_lab.pages.charts import DASHES, LORA, PALETTE, SMOA, lines, save_picture
from smoa_lab.study.report import report

RECALL = {
    "smoa-k8": ("SMoA, K = 8", SMOA),
    "smoa-k2": ("SMoA, K = 2", (PALETTE["smoa"], DASHES[1])),
    "none-spectral-k8": ("blocks without W, K = 8", (PALETTE["melora"], DASHES[2])),
    "hira": ("HiRA", (PALETTE["hira"], DASHES[3])),
    "lora": ("LoRA", LORA),
    "lora-r2": ("LoRA, 2 times the parameters", (PALETTE["lora"], DASHES[2])),
    "lora-r4": ("LoRA, 4 times the parameters", (PALETTE["lora"], DASHES[1])),
}
"""The entries of docs/images/recall.png, their names there and their lines."""


def recalled(folders: list[Path]) -> list[dict[str, Any]]:
    """The share that each entry recalls by the number of pairs, which ends the folder's name."""
    pairs = {folder: int(folder.name.rpartition("-")[2]) for folder in folders}
    return [
        {"name": RECALL[row["entry"]][0], "pairs": pairs[folder], "recalled": 100 * row["accuracy"]}
        for folder in sorted(folders, key=pairs.__getitem__)
        for row in json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if row["entry"] in RECALL
    ]


def draw_recall() -> None:
    """Draw how many random pairs each method recalls by an encoder."""
    rows = recalled(list(stored.STUDIES.glob("recall-[0-9]*")))
    ticks = alt.Axis(
        values=sorted({row["pairs"] for row in rows}), format="d", title="random pairs to learn, 40 passes over them"
    )
    x = alt.X("pairs:Q", axis=ticks, scale=alt.Scale(type="log", nice=False))
    y = alt.Y("recalled:Q", title="recalled (%)", scale=alt.Scale(domain=[0, 100]))
    picture = lines(rows, dict(RECALL.values()), x, y, width=420, height=260)
    save_picture(picture, stored.STUDIES.parent / "docs" / "images" / "recall.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="studies; without any and with --report-only, all that are stored")
    parser.add_argument("--only", nargs="+", default=[], help="entries or budgets; default: all")
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    for name in given.names or [folder.name for folder in stored.folders() if given.report_only]:
        print(name, flush=True)
        if not given.report_only:
            stored.run(name, given.only)
        elif name not in stored.LARGER:
            made = stored.comparison(name)
            report(made.study, made.runner)
    if any(name.startswith("phonebook") for name in given.names) or given.report_only:
        phonebook.report(stored.STUDIES)
    if given.report_only and not given.names:
        draw_recall()
        for file in sorted(results_page.DOCS.glob("inspections/*.json")):
            results_page.draw_inspection(file)


if __name__ == "__main__":
    main()
