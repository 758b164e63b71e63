"""Runs studies of this folder, also those that have a runner of their own, where they stopped; or only reports them.

    python studies/run.py recall-256 [--only ENTRY ...]
    python studies/run.py --report-only            # every stored study anew, and docs/images/swap.png

`smoa compare studies/NAME/NAME.yaml` does the same for a study without a runner of its own.
"""

from __future__ import annotations

import argparse
import json

import altair as alt
import biographies
import phonebook
import stored
from verdict_tables import Compared

from smoa_lab.pages.charts import save_picture
from smoa_lab.study.charts import forest
from smoa_lab.study.report import report, write_report
from smoa_lab.study.statistics import Interval

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
"""Every study of SMoA's default against LoRA, the default's entry, and what docs/images/swap.png calls them."""


def draw_swap() -> None:
    """Draw the accuracy of SMoA's default minus LoRA's, as far as studies compared them."""
    rows = []
    for name, entry, title in SWAPS:
        summary = json.loads((stored.STUDIES / name / "summary.json").read_text(encoding="utf-8"))
        found = Compared("accuracy", entry, "lora-r2" if entry.endswith("-r2") else "lora").values(summary)
        ends = {"low": found.low, "mean": found.difference, "high": found.high}
        words = {"difference": Interval(found.difference, found.low, found.high).signed(1, 1), "verdict": ""}
        rows.append({"entry": title, "method": "smoa", "clear": found.verdict in ("better", "worse"), **ends, **words})
    told = [
        "same number of parameters, learning rates tuned alike (512 numbers: those of 256), 95 % intervals;",
        "filled: significant after Holm's correction",
    ]
    heading = alt.Title("Accuracy after the swap from LoRA to SMoA with its default scale", subtitle=told, offset=10)
    picture = forest(rows, "SMoA's accuracy minus LoRA's (percentage points); right is better").properties(
        title=heading
    )
    save_picture(picture, stored.STUDIES.parent / "docs" / "images" / "swap.png")


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
        elif name in stored.LARGER:
            write_report(stored.report_of(stored.STUDIES / name), stored.STUDIES / name)
        else:
            made = stored.comparison(name)
            report(made.study, made.runner)
    for own in (phonebook, biographies):
        if any(name.startswith(own.__name__) for name in given.names) or given.report_only:
            own.report(stored.STUDIES)
    if given.report_only and not given.names:
        draw_swap()


if __name__ == "__main__":
    main()
