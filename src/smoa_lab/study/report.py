"""Writes a study's README.md, index.html, summary.json and pictures, from its stored trials alone.

A table or chart is made once. ``smoa compare`` prints it, README.md has it as Markdown, and the page as HTML.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from smoa import SmoaConfig
from smoa.atomic import write_whole
from smoa_lab.pages.charts import name_of, save_picture
from smoa_lab.pages.tables import Cell, Table, number
from smoa_lab.pages.templates import Figure, page
from smoa_lab.study import charts
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.results import Row, as_json, rows_of
from smoa_lab.study.statistics import Difference
from smoa_lab.study.study import Study
from smoa_lab.study.trials import TrialStore, Untouched

BUDGET = "Budget: "
BY_TASK = "Accuracy % by task"
EVERY_RUN = "Every run"
PICTURE = "differences.png"
DIFFERENCES = (
    "Test loss minus the reference's, with its interval. Filled points differ after Holm's correction too. Entries are "
    "called by their method and by the settings that are not its defaults; K is the number of blocks."
)
RATES = "Validation loss of each run of the search; * is the best."
SIZES = ("r", "num_blocks", "alpha", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern")
"""Settings of an adapter that are left out of an entry's full name."""
SEARCHED = "Every entry's learning rate is chosen on validation data by the same search. "
INTRODUCTION = (
    "The figures are from fresh seeds on the test part. Differences are to the reference of the same budget, paired by "
    "seed and question, with 95 % intervals (questions resampled, Student's t over seeds). 'Same' means that the "
    "interval includes 0; '(Holm: same)' that Holm's correction for all comparisons of the table takes the verdict "
    "back. One seed gets no verdict. ± is the standard deviation over seeds, s the seconds of training on the machine "
    "that ran most of the runs. ! marks a best learning rate at an edge of the search. Each method has one color. On "
    "the page, point at a mark for its values; it leads to its run."
)
WHERE = (
    "The whole JSON of a run, with its config and the result of every question, is the file of that name in the "
    "study's folder."
)
Sections = dict[str, Table | Figure]
"""The tables and charts of a report under their headings."""


@dataclass(frozen=True)
class Report:
    """What is known of a study: ``summary`` in plain values, and paragraphs before and after the sections."""

    title: str
    summary: Any
    introduction: Sequence[str]
    sections: Sections
    notes: Sequence[str]

    def results(self) -> dict[str, Table]:
        """The tables that a terminal shows, without the columns that it has no room for."""
        tables = {title: table for title, table in self.sections.items() if isinstance(table, Table)}
        return {
            title: table.without("lr").without("runs").without("s")
            for title, table in tables.items()
            if title.startswith(BUDGET)
        }

    def page(self) -> str:
        """The HTML."""
        sections = [(title, [content]) for title, content in self.sections.items()]
        return page(self.title, sections, [*self.introduction, *self.notes])

    def readme(self) -> str:
        """The Markdown, with the pictures that lie beside it."""
        parts = [f"# {self.title}", "Written by `smoa compare` from the stored runs; do not edit.", *self.introduction]
        for title, content in self.sections.items():
            if title != EVERY_RUN:  # README.md has no room for it
                shown = content.markdown() if isinstance(content, Table) else f"![{title}]({PICTURE})"
                parts += [f"## {title}", content.caption, shown]
            elif isinstance(content, Table):
                parts.append(content.caption)
        return "\n\n".join([*parts, *self.notes]) + "\n"


def report(study: Study) -> Report:
    """Write ``README.md``, ``index.html``, ``summary.json`` and the picture into the study's folder.

    Raises:
        DataError: no final run is finished yet, or runs were asked different questions.
        ConfigError: a run was run with other settings than the study's.
    """
    comparison, folder = Comparison(study), study.folder
    comparison.stored(Untouched())  # raises ConfigError
    rows = rows_of(comparison)
    introduction, sections = _sections(study, rows, comparison.store)
    done = {row.entry for row in rows}
    missing = [name for name in study.entries if name not in done]
    notes = [f"The search of a learning rate: {_search_in_words(study)}."]
    notes += [f"Not run yet: {', '.join(missing)}."] if missing else []
    title = f"{folder.name}: answers of {study.shared['model']['name']}"
    made = Report(title, as_json(rows), [text for text in introduction if text], sections, notes)
    write_whole(folder / "summary.json", json.dumps(made.summary, indent=1, allow_nan=False) + "\n")
    for content in sections.values():
        if isinstance(content, Figure):
            save_picture(content.chart, folder / PICTURE)
    write_whole(folder / "README.md", made.readme())
    write_whole(folder / "index.html", made.page())
    return made


def _search_in_words(study: Study) -> str:
    tuning = study.tuning
    if tuning.max_runs == 0:
        return "none; each entry runs at the rate that the study names"
    beside = ", then the two quarter decades next to it" if tuning.refine else ""
    return (
        "half decades around a start, then on in the better direction until the best has neighbors on both sides"
        f"{beside}, at most {tuning.max_runs} runs"
    )


def _sections(study: Study, rows: Sequence[Row], store: TrialStore) -> tuple[list[str], Sections]:
    """Introduction and sections."""
    untouched = store.find("untouched")
    budgets = {
        budget: [row for row in rows if row.budget == budget] for budget in dict.fromkeys(r.budget for r in rows)
    }
    sections: Sections = {f"{BUDGET}{budget}": _results(of_budget) for budget, of_budget in budgets.items()}
    if len(rows[0].task_accuracy) > 1:
        by_task = {f"{BY_TASK}: {budget}": _by_task(of_budget, untouched) for budget, of_budget in budgets.items()}
        sections |= by_task
    chart = charts.differences(rows, _full_names(study, rows))
    sections |= {} if chart is None else {"Differences": Figure(chart, DIFFERENCES)}
    searched = {row.entry: row.search.losses for row in rows if row.search}
    if searched:
        sections["Learning rates"] = _by_rate(searched, store.names("tuning/"))
    sections[EVERY_RUN] = _every_run(store)
    introduction = f"{SEARCHED}{INTRODUCTION}" if searched else INTRODUCTION
    return [introduction, _untouched_sentence(untouched)], sections


def _results(rows: Sequence[Row]) -> Table:
    """The entries of a budget, best loss first."""
    reference = rows[0].reference
    header = ["entry", "trained", "lr", "runs", "seeds", "loss", "accuracy %"]
    header += [f"loss − {reference}", "", f"accuracy % − {reference}", "", "s"]
    lines = []
    for row in rows:
        search = row.search
        rate = f"{row.learning_rate:g}{' !' if search and not search.interior else ''}"
        seeds = len(row.seeds)
        loss = mean_text(row.loss, row.loss_spread, 4, seeds) if math.isfinite(row.loss) else "diverged"
        accuracy = mean_text(100 * row.accuracy, 100 * row.accuracy_spread, 1, seeds)
        line = [
            row.entry,
            Cell(f"{row.parameters:,}", row.parameters),
            rate,
            len(search.losses) if search else 0,
            Cell(str(seeds), links={str(seed): charts.final_run(row, seed) for seed in row.seeds}),
            Cell(loss, row.loss),
            Cell(accuracy, row.accuracy),
            *_difference(row, row.loss_difference, 1, 4),
            *_difference(row, row.accuracy_difference, 100, 1),
            number(row.seconds, 0),
        ]
        lines.append(line)
    return Table(header, lines, "Test results, best loss first.")


def mean_text(value: float, spread: float, digits: int, seeds: int) -> str:
    """The mean over seeds and its spread, which one seed does not have."""
    return f"{value:.{digits}f}" if seeds == 1 else f"{value:.{digits}f} ± {spread:.{digits}f}"


def _difference(row: Row, difference: Difference | None, scale: float, digits: int) -> tuple[Any, str]:
    """Mean and interval, and the verdict; none for the reference, and before a seed of it is finished."""
    if difference is None:
        return "", "reference" if row.entry == row.reference else ""
    return Cell(difference.signed(scale, digits), difference.mean), difference.label


def _by_task(rows: Sequence[Row], untouched: dict[str, Any] | None) -> Table:
    """The accuracy of each task, the untouched model last."""
    tasks = list(rows[0].task_accuracy)
    shares = {row.entry: [row.task_accuracy[task] for task in tasks] for row in rows}
    if untouched is not None:
        shares["untouched"] = [untouched["scores"][task]["accuracy"] for task in tasks]
    lines = [[name, *(f"{100 * share:.1f}" for share in (*of, sum(of) / len(of)))] for name, of in shares.items()]
    return Table(["entry", *tasks, "mean"], lines, "The mean over seeds.")


def _every_run(store: TrialStore) -> Table:
    """The lines that links lead to."""
    lines = []
    for name in store.names():
        run = store.find(name) or {}
        scores, made = run["scores"]["all"], run.get("provenance", {})
        lines.append(
            [
                Cell(name, anchor=True),
                "diverged" if scores["gold_loss"] is None else f"{scores['gold_loss']:.4f}",
                f"{100 * scores['accuracy']:.1f}",
                *("–" if run.get(key) is None else f"{run[key]:g}" for key in ("steps", "seconds")),
                made.get("device", "–"),
                (made.get("commit") or "–")[:7],
            ]
        )
    header = ["run", "loss", "accuracy %", "steps", "s", "machine", "commit"]
    return Table(header, lines, WHERE)


def _by_rate(losses: Mapping[str, Mapping[float, float | None]], runs: Sequence[str]) -> Table:
    """The loss of each entry at each learning rate; None is a run that diverged. Losses lead to those of ``runs`` that
    they are from."""
    rates = sorted({rate for own in losses.values() for rate in own})
    lines = []
    for entry, own in losses.items():
        best, cells = min((loss for loss in own.values() if loss is not None), default=None), []
        for rate in rates:
            loss = own.get(rate)
            text = "" if rate not in own else "diverged" if loss is None else f"{loss:.3f}{' *' * (loss == best)}"
            stem = f"tuning/{entry}/lr-{rate:g}-seed-"
            run = next((f"#{name}" for name in runs if name.startswith(stem)), None)
            cells.append(Cell(text, loss, links={text: run} if run and text else {}))
        lines.append([entry, *cells])
    return Table(["entry", *(f"{rate:g}" for rate in rates)], lines, RATES)


def _full_names(study: Study, rows: Sequence[Row]) -> dict[str, str]:
    """What pictures call each entry: its method and, of SMoA, K and the settings that are not the defaults. Its own
    name is added where another one of its budget has the same."""
    names, usual = {}, SmoaConfig()
    for row in rows:
        names[row.entry] = name_of(row.method)
        if row.method == "smoa":
            adapter = study.entries[row.entry].adapter
            changed = [key for key in adapter if key not in SIZES and adapter[key] != getattr(usual, key, None)]
            settings = [f"K = {adapter.get('num_blocks', usual.num_blocks)}", *(f"{k}={adapter[k]}" for k in changed)]
            names[row.entry] += f", {', '.join(settings)}{'' if changed else ' (default)'}"
    shown = {row.entry: (names[row.entry], row.budget) for row in rows}
    uses = Counter(shown.values())
    return {e: name if uses[shown[e]] == 1 or e == name.lower() else f"{name}: {e}" for e, name in names.items()}


def _untouched_sentence(untouched: dict[str, Any] | None) -> str:
    """The untouched model's scores in a sentence, the means over tasks as of the entries; nothing where it was not
    scored."""
    if untouched is None:
        return ""
    scores = untouched["scores"]["all"]
    tasks = [of_task for name, of_task in untouched["scores"].items() if name != "all"] or [scores]
    accuracy = fmean(of_task["accuracy"] for of_task in tasks)
    text = f"The untouched model: loss {number(scores['gold_loss'], 4)}, accuracy {100 * accuracy:.1f} %"
    if scores["majority"] is not None:
        majority = fmean(of_task["majority"] for of_task in tasks)
        text += f"; the commonest label of each task is right in {100 * majority:.1f} %"
    return f"{text}."
