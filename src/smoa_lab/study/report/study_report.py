"""Writes a study's README.md, index.html, summary.json and pictures, from its stored trials alone."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from smoa.atomic import write_whole
from smoa.errors import DataError
from smoa_lab.drawing.markdown_tables import markdown_table
from smoa_lab.drawing.pages import write_page
from smoa_lab.drawing.picture_files import save_pictures
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.packing import PACK, shell_command
from smoa_lab.study.report.results.rows import (
    BY_TASK,
    Row,
    accuracy_by_task,
    as_json,
    commonest_machine,
    difference_cells,
    entry_row,
    missing_sentence,
    untouched_sentence,
    with_holm,
)
from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.report.study_page import charts, study_page
from smoa_lab.study.study_file import Study
from smoa_lab.study.trials import TrialStore

PICTURES = {
    "Differences": "differences.png",
    "Learning rates": "learning_rates.png",
    "Accuracy against trained parameters": "accuracy.png",
    "Learning against forgetting": "frontier.png",
}
"""The charts that are saved as files too, by their headings on the page."""


def report(study: Study) -> list[Row]:
    """Write ``README.md``, ``index.html``, ``summary.json`` and pictures into the study's folder; the rows by loss.

    Raises:
        DataError: no final run is finished yet.
        ConfigError: a run was run with other settings than the study's.
    """
    machine = commonest_machine(study)
    found = (entry_row(study, name, machine) for name in study.entries)
    by_budget = groupby(sorted(filter(None, found), key=lambda row: (row.budget, row.loss)), lambda row: row.budget)
    rows = [row for _, of_budget in by_budget for row in with_holm(list(of_budget))]
    if not rows:
        raise DataError(f"{study.folder}: no final run is finished yet; run smoa compare on this study first")
    untouched = Comparison(study).stored_untouched()
    write_whole(study.folder / "summary.json", json.dumps(as_json(rows), indent=1, allow_nan=False) + "\n")
    pictures = _draw(study, rows)
    write_whole(study.folder / "README.md", _readme(study, rows, untouched, pictures))
    write_page(study.folder / "index.html", study_page(_title(study), study.folder, rows))
    return rows


def _draw(study: Study, rows: list[Row]) -> dict[str, str]:
    """The pictures that the finished trials allow: title by file name."""
    found = charts(rows, TrialStore(study.folder))
    pictures = {file: title for title, file in PICTURES.items() if title in found}
    for file, title in pictures.items():
        save_pictures(found[title], study.folder / file)
    return pictures


def _title(study: Study) -> str:
    return f"{study.folder.name}: {study.kind} of {study.shared['model']['name']}"


def _search_in_words(study: Study) -> str:
    tuning = study.tuning
    if tuning.sweep is not None:
        step = "half" if tuning.per_decade == 2 else "quarter"
        own = any(entry.sweep is not None for entry in study.entries.values())
        lowest, highest = tuning.sweep
        return f"every {step} decade from {lowest:g} to {highest:g}{', or of its own range' if own else ''}"
    beside = ", then the two quarter decades next to it" if tuning.refine else ""
    return (
        "half decades around a start, then on in the better direction until the best has neighbors on both sides, at "
        f"most {tuning.max_runs} runs{beside}"
    )


def _readme(study: Study, rows: list[Row], untouched: dict[str, Any] | None, pictures: dict[str, str]) -> str:
    parts = [
        f"# {_title(study)}",
        "Written by `smoa compare` from the stored runs; do not edit. Each entry's learning rate is chosen "
        f"on validation data by the same search: {_search_in_words(study)}. The figures are from fresh "
        "seeds on the test part. Differences are paired by seed and question, with 95 % intervals (questions "
        "resampled, Student's t over seeds). *Same* means that the interval includes 0; *(Holm: same)* that Holm's "
        "correction for all comparisons of the table takes the verdict back. One seed gets no verdict. ± is the "
        "standard deviation over seeds. *s* is the seconds of training on the machine that ran most of the runs. "
        "(!) marks a best learning rate at an edge of the search.",
    ]
    budgets = dict.fromkeys(row.budget for row in rows)
    parts += [_table([row for row in rows if row.budget == budget], budget) for budget in budgets]
    parts += [_tasks([row for row in rows if row.budget == budget], budget, untouched) for budget in budgets]
    parts.append(untouched_sentence(untouched))
    parts += [f"![{title}]({file})" for file, title in pictures.items()]
    parts.append(
        "`smoa compare … --report-only` writes the same as a page, index.html, on which every point leads to its run. "
        "The whole JSON of a run is "
        f"`STAGE/ENTRY/lr-RATE-seed-SEED.json` in this folder or, once the study is packed, a line of `{PACK}`: "
        f"`{shell_command(f'final/{rows[0].entry}/')}`"
    )
    parts.append(missing_sentence(study, [row.entry for row in rows]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(rows: list[Row], budget: str) -> str:
    reference = rows[0].reference
    names = ["entry", "trained", "lr", "runs", "seeds", "loss", "accuracy %"]
    names += [f"loss − {reference}", "", f"accuracy % − {reference}", "", "elsewhere", "s"]
    marks = ["---", *["--:"] * 7, "---", "--:", "---", "--:", "--:"]
    return f"## Budget: {budget}\n\n" + markdown_table(names, map(_cells, rows), marks)


def _tasks(rows: list[Row], budget: str, untouched: dict[str, Any] | None) -> str:
    cells = accuracy_by_task(rows, untouched)
    if not cells:
        return ""
    header, *lines = cells
    return f"### {BY_TASK}: {budget}\n\n" + markdown_table(header, lines)


def _cells(row: Row) -> list[str]:
    search = row.search
    rate = "" if search is None else f"{search.learning_rate:g}{'' if search.interior else ' !'}"
    return [
        row.entry,
        f"{row.parameters:,}",
        rate,
        str(len(search.losses) if search else 0),
        str(len(row.seeds)),
        f"{row.loss:.4f} ± {row.loss_spread:.4f}",
        f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_spread:.1f}",
        *_difference(row, row.loss_difference, 1, 4),
        *_difference(row, row.accuracy_difference, 100, 1),
        "–" if row.elsewhere is None else f"{row.elsewhere:.3f}",
        "–" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def _difference(row: Row, found: Difference | None, scale: float, digits: int) -> tuple[str, str]:
    mean, interval, verdict = difference_cells(row, found, scale, digits)
    return f"{mean} {interval}".strip(), verdict
