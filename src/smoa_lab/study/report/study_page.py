"""A study as an interactive page that works offline: differences, rates, accuracy, forgetting, cost, and every run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smoa_lab.drawing.chart_script import SCRIPT
from smoa_lab.drawing.pages import Html, anchor, figure, link, page, paragraph, section, table
from smoa_lab.study.packing import PACK, shell_command
from smoa_lab.study.report.charts.frontier import frontier
from smoa_lab.study.report.charts.rate_charts import learning_rates
from smoa_lab.study.report.charts.study_charts import accuracy, cost, differences, final_run
from smoa_lab.study.report.results.rows import BY_TASK, Row, accuracy_by_task, difference_cells, untouched_sentence
from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.trials import TrialStore

HEADER = [
    *("entry", "budget", "trained", "lr", "runs", "loss", "loss difference", "", "accuracy %"),
    *("accuracy difference %", "", "elsewhere", "s a run", "final runs, by seed"),
]
RUNS_HEADER = ["run", "loss", "accuracy %", "steps", "s", "machine", "commit"]
INTRODUCTION = (
    "Every entry's learning rate is chosen on validation data by the same search. The figures are from fresh seeds on "
    "the test part. Differences are to the reference of the same budget, paired by seed and question, with 95 % "
    "intervals (questions resampled, Student's t over seeds). 'Same' means that the interval includes 0. Each method "
    "has one color. Point at a mark for its values; it leads to its run."
)
CAPTIONS = {
    "Differences": "Test loss minus the reference's, with its interval. Filled points differ after Holm's correction "
    "too.",
    "Learning rates": "Each entry's search in color over all others in gray. Lines go on above the frame.",
    "Accuracy against trained parameters": "Mean over tasks, with 95 % intervals over seeds and questions. Entries of "
    "equal parameters stand side by side.",
    "Learning against forgetting": "Every final run's test loss, and its loss on text of another domain. A ring is "
    "the mean over seeds. Right is learned more, down is kept more. The dotted line is the untouched model.",
    "Cost": "Seconds of a final run's training, mean over seeds, on the machine that ran most of the runs.",
}
WHERE = (
    "The whole JSON of a run, with its config and the result of every question, is the file of that name in the "
    f"study's folder or, once the study is packed, a line of {PACK}: "
)


def study_page(title: str, folder: Path, rows: Sequence[Row], script: str = SCRIPT) -> str:
    """The HTML, from the rows of the summary and the runs stored in ``folder``."""
    store = TrialStore(folder)
    untouched = store.find("untouched")
    by_task = accuracy_by_task(rows, untouched)
    drawn = charts(rows, store)
    shown = {name: section(name, figure(drawn[name], text)) for name, text in CAPTIONS.items() if name in drawn}
    parts = [
        *(paragraph(text) for text in (INTRODUCTION, untouched_sentence(untouched)) if text),
        shown.pop("Differences", ""),
        section("Results", table("Test results, best loss first. Click a heading to sort.", HEADER, _cells(rows))),
        *([section(BY_TASK, table("The mean over seeds.", by_task[0], by_task[1:]))] if by_task else []),
        *shown.values(),
        section(
            "Runs",
            paragraph(WHERE + shell_command(f"final/{rows[0].entry}/")),
            table("Every finished run.", RUNS_HEADER, [_run(name, found) for name, found in _runs(store)]),
        ),
    ]
    return page(title, *parts, script=script)


def charts(rows: Sequence[Row], store: TrialStore) -> dict[str, Any]:
    """The charts that the finished runs allow, by their headings."""
    found = {
        "Differences": differences(rows),
        "Learning rates": learning_rates(rows, store.names("tuning/")),
        "Accuracy against trained parameters": accuracy(rows),
        "Learning against forgetting": _forgetting(rows, store),
        "Cost": cost(rows),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


def _forgetting(rows: Sequence[Row], store: TrialStore) -> Any | None:
    """The chart of what final runs learned and forgot; None for a study that does not measure it."""
    runs = []
    for row in rows:
        for seed in row.seeds:
            name = final_run(row, seed)
            found = store.find(name.removeprefix("#")) or {}
            losses = {"learned": found["scores"]["all"]["gold_loss"], "kept": found.get("elsewhere")}
            shared = {"entry": row.entry, "method": row.method, "learning_rate": row.learning_rate, "seed": seed}
            runs.append({**shared, **losses, "run": name})
    untouched = store.find("untouched") or {}
    titles = ("test loss (nats)", "loss elsewhere (nats)")
    return frontier(runs, titles, untouched.get("elsewhere"))


def _cells(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return [
        (
            row.entry,
            row.budget,
            (f"{row.parameters:,}", row.parameters),
            "" if row.search is None else f"{row.learning_rate:g}",
            len(row.search.losses) if row.search else 0,
            f"{row.loss:.4f}" if math.isfinite(row.loss) else "diverged",
            *_difference(row, row.loss_difference, 1, 4),
            f"{100 * row.accuracy:.1f}",
            *_difference(row, row.accuracy_difference, 100, 1),
            "–" if row.elsewhere is None else f"{row.elsewhere:.3f}",
            "–" if row.seconds is None else f"{row.seconds:.0f}",
            Html(" ".join(link(final_run(row, seed), str(seed)) for seed in row.seeds)),
        )
        for row in rows
    ]


def _difference(row: Row, found: Difference | None, scale: float, digits: int) -> tuple[Any, str]:
    """The interval, sorted by its mean, and the verdict."""
    _, interval, verdict = difference_cells(row, found, scale, digits)
    return interval if found is None else (interval, found.mean), verdict


def _runs(store: TrialStore) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every finished run: the lines that links lead to."""
    return ((name, found) for name in store.names() if (found := store.find(name)) is not None)


def _run(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    scores, made = found["scores"]["all"], found.get("provenance", {})
    return (
        anchor(name),
        "diverged" if scores["gold_loss"] is None else f"{scores['gold_loss']:.4f}",
        f"{100 * scores['accuracy']:.1f}",
        *("–" if found.get(key) is None else f"{found[key]:g}" for key in ("steps", "seconds")),
        made.get("device", "–"),
        (made.get("commit") or "–")[:7],
    )
