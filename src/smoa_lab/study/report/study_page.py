"""A study as one offline page: sortable table, accuracy, learning rates, cost, every run and the way to its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from smoa_lab.drawing.pages import anchor, figure, link, page, paragraph, section, table
from smoa_lab.drawing.plots import new_figure
from smoa_lab.study.packing import PACK, shell_command
from smoa_lab.study.report.pictures import MARKERS, STYLES
from smoa_lab.study.report.rows import BY_TASK, Row, accuracy_by_task, difference_cells
from smoa_lab.study.report.statistics import Difference
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import Trial, TrialStore

HEADER = [
    *("entry", "budget", "trained", "lr", "runs", "loss", "loss difference", "", "accuracy %"),
    *("accuracy difference %", "", "elsewhere", "s a run", "final runs, by seed"),
]
RUNS_HEADER = ["run", "loss", "accuracy %", "steps", "s", "machine", "commit"]
ACCURACY = (
    "Mean over tasks, with 95 % intervals over seeds and questions. Entries of equal parameters are drawn side "
    "by side. Every point links to a run."
)
SEARCHES = "Validation loss of the search by learning rate. Every point links to its run."
COST = "Seconds of a final run's training, mean over seeds, on the machine that ran most of the runs."
WHERE = (
    "The whole JSON of a run, with its config and the result of every question, is the file of that name in this "
    f"folder or, once the study is packed, a line of {PACK}: "
)


def study_page(study: Study, rows: Sequence[Row], untouched: dict[str, Any] | None, remarks: Sequence[str]) -> str:
    """The HTML; ``remarks`` are put under the introduction."""
    by_task = accuracy_by_task(rows, untouched)
    searches = {row.entry: row.search.losses for row in rows if row.search is not None}
    parts = [
        paragraph(
            "Every entry's learning rate is chosen on validation data by the same search. The figures are from fresh "
            "seeds on the test part. Differences are to the reference of the same budget, paired by seed and question, "
            "with 95 % intervals (questions resampled, Student's t over seeds). 'Same' means that the interval "
            "includes 0."
        ),
        *(paragraph(remark) for remark in remarks if remark),
        section(
            "Results", table("Test results, best loss first. Click a heading to sort.", HEADER, _cells(study, rows))
        ),
        *([section(BY_TASK, table("The mean over seeds.", by_task[0], by_task[1:]))] if by_task else []),
        section("Accuracy against trained parameters", figure(_accuracy(study, rows), ACCURACY)),
        *([section("Learning rates", figure(_searches(study, searches), SEARCHES))] if searches else []),
        section("Cost", figure(_cost(rows), COST)),
        section(
            "Runs",
            paragraph(WHERE + shell_command(f"final/{rows[0].entry}/")),
            table("Every finished run.", RUNS_HEADER, _runs(study)),
        ),
    ]
    return page(f"{study.folder.name}: {study.kind} of {study.shared['model']['name']}", *parts)


def _cells(study: Study, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return [
        (
            row.entry,
            row.budget,
            (f"{row.parameters:,}", row.parameters),
            "" if row.search is None else f"{row.search.learning_rate:g}",
            len(row.search.losses) if row.search else 0,
            f"{row.loss:.4f}",
            *_difference(row, row.loss_difference, 1, 4),
            f"{100 * row.accuracy:.1f}",
            *_difference(row, row.accuracy_difference, 100, 1),
            "–" if row.elsewhere is None else f"{row.elsewhere:.3f}",
            "–" if row.seconds is None else f"{row.seconds:.0f}",
            "<span>" + " ".join(link(_final(study, row, seed), str(seed)) for seed in row.seeds) + "</span>",
        )
        for row in rows
    ]


def _difference(row: Row, found: Difference | None, scale: float, digits: int) -> tuple[Any, str]:
    """The interval, sorted by its mean, and the verdict."""
    _, interval, verdict = difference_cells(row, found, scale, digits)
    return interval if found is None else (interval, found.mean), verdict


def _final(study: Study, row: Row, seed: int) -> str:
    rate = row.search.learning_rate if row.search else study.entries[row.entry].learning_rate
    return f"#{Trial('final', row.entry, rate, seed).name}"


def _runs(study: Study) -> list[tuple[str, ...]]:
    """One line for each finished run, which links lead to."""
    store = TrialStore(study.folder)
    return [_run(name, found) for name in store.names() if (found := store.find(name)) is not None]


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


def _accuracy(study: Study, rows: Sequence[Row]) -> Any:
    drawn, axes = new_figure(5.0)
    for row, place, marker in zip(rows, _side_by_side(rows), cycle(MARKERS), strict=False):
        found = row.accuracy_interval
        spread = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
        axes.errorbar(place, 100 * found.mean, yerr=spread, color="#000000", linewidth=0.8, capsize=2)
        points = axes.scatter([place], [100 * found.mean], color="#000000", marker=marker, label=row.entry)
        points.set_urls([_final(study, row, row.seeds[0])])
    axes.set_xscale("log")
    numbers = [row.parameters for row in rows]
    axes.set_xlim(min(numbers) / 2, max(numbers) * 2)  # wide enough for labels that don't run into each other
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("accuracy on the test part (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return drawn


def _side_by_side(rows: Sequence[Row]) -> list[float]:
    """Where each row's point stands on the axis of parameters: those of equal ones 3 % apart, around their number."""
    equal = [[other.entry for other in rows if other.parameters == row.parameters] for row in rows]
    steps = [names.index(row.entry) - (len(names) - 1) / 2 for row, names in zip(rows, equal, strict=True)]
    return [row.parameters * 1.03**step for row, step in zip(rows, steps, strict=True)]


def _searches(study: Study, searches: Mapping[str, Mapping[float, float | None]]) -> Any:
    drawn, axes = new_figure(5.0)
    for (entry, found), marker, style in zip(searches.items(), cycle(MARKERS), cycle(STYLES), strict=False):
        losses = {rate: loss for rate, loss in found.items() if loss is not None}
        axes.plot(list(losses), list(losses.values()), style, color="#000000", linewidth=0.8)
        points = axes.scatter(list(losses), list(losses.values()), color="#000000", marker=marker, label=entry)
        points.set_urls([f"#{Trial('tuning', entry, rate, study.tuning.seed).name}" for rate in losses])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss of gold answers (nats per token)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return drawn


def _cost(rows: Sequence[Row]) -> Any:
    drawn, axes = new_figure(1.2 + 0.3 * len(rows))
    axes.barh([row.entry for row in rows], [row.seconds or 0 for row in rows], color="#808080")
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return drawn
