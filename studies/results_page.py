"""Writes docs/results.md and the table of docs/verdict.md from the stored studies: python studies/results_page.py."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

import calibration
import headroom
import verdict_tables
from stored import PACK, compared, folders, runs_of, summary_of

from smoa_lab.pages.tables import Table

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# Results

Written by `python studies/results_page.py` from stored JSON; do not edit.

Each study leads to its report: tables, pictures, every run, and which learning rates were searched. All entries of a
study got the same search on validation data, then fresh seeds on the test part. [The verdict](verdict.md) sums up what
the studies show.

The last column counts entries against the reference of their budget (`r1` means the trainable parameters of a LoRA of
rank 1) by the test loss, or by what was recalled, paired by seed and question. *Same* means that the 95 % interval
includes 0, or that Holm's correction for all comparisons of the budget takes the difference back.
"""
COMPARED = "Reports that `smoa compare` wrote itself, by loss or by answers:"
PLANNED = (
    "The planned tests that [the verdict](verdict.md#planned-tests) does not show, in the same columns. *Forgot* is "
    "the rise of the first task's loss; *rate too high* is one step above each method's best rate."
)
HEADROOM = (
    "Can a study of a task show a difference between methods? A small LoRA and full fine-tuning get the same search "
    "for a learning rate. A task has headroom if training moves accuracy and full fine-tuning beats LoRA, both by "
    "three standard errors (of questions and of seeds)."
)
INTERVALS = (
    "How often 95 % intervals miss the mean of at least three seeds that were left out, in the stored studies with "
    "five seeds or more ([figures](../studies/{file}), `python studies/calibration.py`). *Before*: each pair by "
    "itself, up to commit d0353ac6; *now*: the variance of all entries together. *Seeds*: on the same rows; *whole*: "
    "from half the rows to the other half. In brackets, the worst set."
)
SEARCHES = (
    "Searches simulated on {curves} stored curves: before, half decades and the quarters beside the best; now, "
    "quarter decades and the vertex of a parabola. Regret: the loss at the chosen rate above the lowest."
)
WIDTH = 120
HEADER = ["study", "model", "tasks", "entries", "better, same or worse"]
VERDICTS = ("better", "same", "worse", "one seed")
RECALLED = {"random pairs", "phone book"}


def main(docs: Path = DOCS) -> None:
    table = Table(HEADER, list(map(line, folders()))).markdown(["---"] * len(HEADER))
    planned = (
        f"## Other planned tests\n\n{textwrap.fill(PLANNED, WIDTH)}\n\n{verdict_tables.table(verdict_tables.OTHERS)}"
    )
    reports = ", ".join(f"[{folder.name}](../studies/{folder.name}/README.md)" for folder in compared())
    table += f"\n\n{COMPARED} {reports}."
    text = f"{INTRODUCTION}\n{table}\n\n{planned}\n\n{headroom_table()}\n{calibration_tables()}"
    (docs / "results.md").write_text(text, encoding="utf-8")
    verdict_tables.write(docs / "verdict.md")


def line(folder: Path) -> list[str]:
    """A study: a link to its report, what its final runs trained, and what came out."""
    summary = summary_of(folder)
    runs = [run for name, run in runs_of(folder).items() if name.startswith("final/")]
    run, steps = runs[0], [own["steps"] for own in runs]
    fewest_to_most = " to ".join(map(str, sorted({min(steps), max(steps)})))
    model, data, batch = (run["config"][key] for key in ("model", "data", "training"))
    is_sequence = isinstance(summary, dict)
    entries = {row["entry"] for row in (summary["runs"] if is_sequence else summary)}
    return [
        f"[{folder.name}](../studies/{folder.name}/README.md)",
        f"{model['name']}, {model['dtype']}",
        f"{', '.join(data['tasks'])}: {data['train_examples']} examples, {fewest_to_most} steps of "
        f"{batch['per_device_train_batch_size']}, {run['scores']['all']['questions']} questions",
        f"{len(entries)}",
        "–" if is_sequence else verdicts(summary, "accuracy" if set(data["tasks"]) & RECALLED else "loss"),
    ]


def headroom_table() -> str:
    """The table of all tasks on which LoRA and full fine-tuning were tuned alike."""
    tried = [folder for folder in folders() if headroom.is_of_headroom(folder)]
    lines = Table(headroom.HEADER, [headroom.line(folder) for folder in tried]).markdown()
    runs = ", ".join(f"[{folder.name}](../studies/{folder.name}/{PACK})" for folder in tried)
    return f"## Headroom\n\n{textwrap.fill(HEADROOM, WIDTH)}\n\n{lines}\n\nEvery run as a line of JSON: {runs}.\n"


def calibration_tables() -> str:
    """How often intervals miss, and what searches cost."""
    found = json.loads(calibration.FILE.read_text(encoding="utf-8"))
    lines: list[list[str]] = []
    for entries in dict.fromkeys(table["entries"] for table in found["tables"]):
        own = [table["sets"] for table in found["tables"] if table["entries"] == entries]
        for measure in ("seeds", "whole"):
            shares = [[each[measure][rule] for each in sets] for sets in own for rule in calibration.RULES]
            told = [f"{fmean(each):.3f} ({max(each):.3f})" for each in shares]
            lines.append([f"{entries} entries, {measure}", *told])
        widths = [fmean(each["half"]["now"] / each["half"]["before"] for each in sets) for sets in own]
        lines.append([f"{entries} entries, width", *(text for width in widths for text in ("1", f"{width:.2f}"))])
    told = [f"{of_rule[rule]:.3f}" for of_rule in found["wild"].values() for rule in calibration.RULES]
    lines.append(["one of 4 entries with 5 × the sd, simulated", *told])
    header = [f"{seeds} seeds, {rule}" for seeds in calibration.SEEDS for rule in calibration.RULES]
    searches = [
        [rule, f"{one['runs']:.2f}", f"{one['regret']:.4f}", f"{one['regret_in_spreads']:.2f}"]
        for rule, one in found["searches"].items()
    ]
    parts = [
        "## How often intervals miss",
        textwrap.fill(INTERVALS.format(file=calibration.FILE.name), WIDTH),
        Table(["miss rate", *header], lines).markdown(),
        textwrap.fill(SEARCHES.format(curves=found["curves"]), WIDTH),
        Table(["search", "runs a method", "regret", "in sd of seeds"], searches).markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def verdicts(rows: list[dict[str, Any]], measure: str) -> str:
    """How many entries of each budget are better, the same and worse than the reference, after Holm's correction."""
    told = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == budget]
        found = [each for row in own if (each := row[f"{measure}_difference"])]
        words = [each["holm_verdict"] or each["verdict"] for each in found]
        counts = ", ".join(f"{count} {word}" for word in VERDICTS if (count := words.count(word)))
        told += [f"{budget}, to {own[0]['reference']}: {counts}"] if counts else []
    return "; ".join(told)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
