"""Writes docs/results.md and the table of docs/verdict.md from the stored studies: python studies/results_page.py."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import again
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
the studies show, and says [what smollm2-135m and gemma3-270m are](verdict.md#the-base-models): unpacked from 4-bit
files.

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
BOUNDS = (
    "How often the bounds of `smoa compare` miss at a nominal 5 %, in % of 4,000 simulated studies "
    "([figures](../studies/{file}), `python studies/calibration.py`): the worst of groups of 1, 5 and 10 rows with "
    "an intraclass correlation of 0.5, of rows with 0 to 1 times the variance of a seed, of two, three and five "
    "seeds and of two and four entries; right answers of shares from 0.05 to 0.98. *Skewed* rows have a gamma "
    "distribution of skew 1; *one side* is the worse one. *Two seeds of two* entries, on both sides, stand apart: "
    "their t is weighted by Cochran and Cox. *Uneven* groups: the k-th has a k-th of the first's rows, or one half "
    "of all."
)
WHOLE = (
    "Whole studies at the levels of their looks, in % of {draws:,}: how many take an entry that keeps just too little, "
    "by *loss* and by *right answers*, such a one that varies five times as much as its rivals (*wild*), or any where "
    "all are worse than the base model (*harmful*); the worst of {groups} groups, of rows with 0 to 1 times the "
    "variance of a seed, and of base models that are right in 5 to 50 %. *Before*: at commit aa0fbca9, of 4,000 with "
    "50 groups; the bounds and levels are the same since."
)
WILD_PAIR = (
    "*Wild pair*: one look at a pair with a wild entry, two sides, with two, three and five seeds. *Width*: a bound "
    "at 5 % in half intervals of the rule of 29 November, where seeds alone err, with two, three and four seeds."
)
BEFORE = {"2, 3": ("2.7", "6.8"), "2, 4": ("1.6", "6.3"), "4, 3": ("2.3", "5.2"), "4, 4": ("2.1", "5.3")}
"""By loss and with a wild entry, by the numbers of entries and rounds: what this page said at aa0fbca9."""
REPLAYED = (
    "The stored studies of `smoa compare` in every order of their seeds ([figures](../studies/replay.json), `python"
    " studies/again.py replay`): after which round they would have ended, what they would have taken, and their "
    "minutes in those of all rounds, searches included."
)
SEARCHES = (
    "Searches simulated on {curves} stored curves: before, half decades and the quarters beside the best; now, "
    "quarter decades and the vertex of a parabola. Regret: the loss at the chosen rate above the lowest."
)
WIDTH = 120
HEADER = ["study", "model", "tasks", "entries", "better, same or worse"]
WHOLE_HEADER = ["entries", "rounds", "loss", "right answers", "wild", "harmful", "loss, before", "wild, before"]
SIDES = {"two": "both sides", "one": "one side", "few": "two seeds of two"}
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
    """How often bounds miss, what studies would have taken, and what searches cost."""
    found = json.loads(calibration.FILE.read_text(encoding="utf-8"))
    columns = [
        (kind, side)
        for kind in ("even", "skewed", "uneven", "right")
        for side in SIDES
        if side != "few" or kind in ("even", "skewed")
    ]
    rows = [[str(row["groups"]), *(f"{100 * row[kind][side]:.1f}" for kind, side in columns)] for row in found["rows"]]
    header = ["groups", *(f"{kind}, {SIDES[side]}" for kind, side in columns)]
    whole, pairs = [], []
    for key in sorted({*found["whole"], *BEFORE}):
        now, before = found["whole"].get(key), BEFORE.get(key, ("–", "–"))
        shares = [f"{100 * now[name]:.1f}" if now else "–" for name in ("wrong", "right", "wild", "harmful")]
        whole.append([*key.split(", "), *shares, *before])
    for entries in map(str, calibration.ENTRIES):
        wild = ", ".join(f"{100 * each[entries]['two']:.1f}" for each in found["wild"].values())
        widths = ", ".join(f"{each:.2f}" for key, each in found["widths"].items() if key.startswith(f"{entries},"))
        pairs.append([entries, wild, widths])
    replayed = [
        [
            f"[{name}](../studies/{name}/README.md)",
            _counts(one["rounds"]),
            _counts(one["takes"]),
            f"{one['minutes']:.2f}",
        ]
        for name, one in json.loads(again.REPLAY.read_text(encoding="utf-8")).items()
    ]
    searches = [
        [rule, f"{one['runs']:.2f}", f"{one['regret']:.4f}", f"{one['regret_in_spreads']:.2f}"]
        for rule, one in found["searches"].items()
    ]
    parts = [
        "## How often bounds miss",
        textwrap.fill(BOUNDS.format(file=calibration.FILE.name), WIDTH),
        Table(header, rows).markdown(),
        textwrap.fill(WHOLE.format(draws=calibration.WHOLE_DRAWS, groups=_listed(calibration.WHOLE_GROUPS)), WIDTH),
        Table(WHOLE_HEADER, whole).markdown(),
        textwrap.fill(WILD_PAIR, WIDTH),
        Table(["entries", "wild pair", "width"], pairs).markdown(),
        textwrap.fill(REPLAYED, WIDTH),
        Table(["study", "ended after round", "took", "minutes"], replayed).markdown(),
        textwrap.fill(SEARCHES.format(curves=found["curves"]), WIDTH),
        Table(["search", "runs a method", "regret", "in sd of seeds"], searches).markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _counts(orders: dict[str, int]) -> str:
    return ", ".join(f"{what}: {number} of {sum(orders.values())}" for what, number in orders.items())


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
