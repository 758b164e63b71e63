"""Draws docs/images/swap.png, SMoA's accuracy minus LoRA's in the studies of its default: python studies/swap.py."""

from __future__ import annotations

import altair as alt
from stored import STUDIES, summary_of
from tables import Compared

from smoa_lab.pages.charts import forest, save_picture

SWAPS = [
    ("recall-512", "smoa-k8", "recalling 512 random pairs, MiniLM 22M"),
    ("recall-256", "smoa-k8", "recalling 256 random pairs, MiniLM 22M"),
    ("recall-gemma-256", "smoa-k8", "recalling 256 random pairs, Gemma 3 270M"),
    ("phonebook-512", "smoa-spectral", "recalling 512 numbers, SmolLM2 135M"),
    ("phonebook-512", "smoa-spectral-r2", "512 numbers, twice the parameters"),
    ("phonebook-256", "smoa-spectral", "recalling 256 numbers, SmolLM2 135M"),
    ("phonebook-256", "smoa-spectral-r2", "256 numbers, twice the parameters"),
    ("scale-headlines", "spectral-lora", "satire or news headlines, MiniLM 22M"),
    ("scale-csqa", "spectral-lora", "CommonsenseQA, 300 questions, Gemma 3 270M"),
    ("which-blocks", "smoa-spectral", "CommonsenseQA, 1,221 questions, Gemma 3 270M"),
]
"""The study, the entry of SMoA's default, and what the picture calls them."""
TITLE = "Accuracy after the swap from LoRA to SMoA with its default scale"
TOLD = [
    "same number of parameters, learning rates tuned alike (512 numbers: those of 256), 95 % intervals;",
    "filled: significant after Holm's correction",
]


def main() -> None:
    rows = []
    for study, entry, title in SWAPS:
        compared = Compared("accuracy", entry, "lora-r2" if entry.endswith("-r2") else "lora")
        found = compared.values(summary_of(study))
        rows.append(
            {
                "entry": title,
                "method": "smoa",
                "clear": found.verdict in ("better", "worse"),
                "low": found.low,
                "mean": found.difference,
                "high": found.high,
                "difference": f"{found.difference:+.1f} [{found.low:+.1f}, {found.high:+.1f}]",
                "verdict": "",
            }
        )
    chart = forest(rows, "SMoA's accuracy minus LoRA's (percentage points); right is better")
    heading = alt.Title(TITLE, subtitle=TOLD, offset=10)
    save_picture(chart.properties(title=heading), STUDIES.parent / "docs" / "images" / "swap.png")


if __name__ == "__main__":
    main()
