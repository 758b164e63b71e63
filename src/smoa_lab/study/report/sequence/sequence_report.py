"""Writes the README.md, index.html, summary.json and picture of a sequence, from its stored trials alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from smoa.atomic import write_whole
from smoa.errors import DataError
from smoa_lab.basics.plain_json import finite
from smoa_lab.drawing.markdown_tables import markdown_table
from smoa_lab.drawing.pages import write_page
from smoa_lab.drawing.picture_files import save_pictures
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report.charts.frontier import CAPTION
from smoa_lab.study.report.results.rows import missing_sentence
from smoa_lab.study.report.results.statistics import spearman
from smoa_lab.study.report.sequence.compared import Compared, with_holm
from smoa_lab.study.report.sequence.curves import EXPLANATIONS, Curve, curves_of, final_runs, run_rows
from smoa_lab.study.report.sequence.equal_learning import at_equal_learning, at_lower_levels, least_gaps
from smoa_lab.study.report.sequence.next_rate import at_next_rate
from smoa_lab.study.report.sequence.sequence_page import sequence_chart, sequence_page
from smoa_lab.study.report.sequence.sequence_tables import (
    FORGOT,
    INTRODUCTION,
    RUNS_HEADER,
    before_sentence,
    run_line,
    table_sections,
)
from smoa_lab.study.study_file import Study


def sequence_report(study: Study) -> dict[str, Any]:
    """Write the study's files; what ``summary.json`` has.

    Raises:
        DataError: no run is finished yet, or runs were asked different questions.
        ConfigError: a run was run with other settings than the study's.
    """
    runs = final_runs(study)
    rows = run_rows(study, runs)
    if not rows:
        raise DataError(f"{study.folder}: no final run is finished yet; run smoa compare on this study first")
    curves = curves_of(runs)
    untouched = Comparison(study).stored_untouched()
    summary: dict[str, Any] = finite(
        {
            "before": None if untouched is None else _before(untouched),
            **_comparisons(study, curves),
            "least_gaps": least_gaps(curves),
            "kept_elsewhere": _comparisons(study, curves_of(runs, "elsewhere")),
            "correlations": _correlations(rows),
            "runs": rows,
        }
    )
    write_whole(study.folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    drawn = sequence_chart(summary)
    if drawn is not None:
        save_pictures(drawn, study.folder / "frontier.png")
    write_whole(study.folder / "README.md", _readme(study, summary))
    write_page(study.folder / "index.html", sequence_page(_title(study), summary))
    return summary


def _comparisons(study: Study, curves: Sequence[Curve]) -> dict[str, list[dict[str, Any]]]:
    """Each entry against its reference at equal learning, at less learning, and one rate too high.

    The first two are corrected together, since they are one question at several levels.
    """
    pairs = _with_references(study, curves)
    equal = [at_equal_learning(*pair) for pair in pairs]
    lower = [one for pair in pairs for one in at_lower_levels(*pair)]
    levels = _rows([*equal, *lower])
    return {
        "equal": levels[: len(equal)],
        "lower_levels": levels[len(equal) :],
        "next_rate": _rows(at_next_rate(*pair) for pair in pairs),
    }


def _with_references(study: Study, curves: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    """Each entry that has a reference, with it; a reference with itself."""
    by_entry = {own.entry: own for own in curves}
    pairs = ((own, by_entry.get(study.reference(study.entries[own.entry].budget))) for own in curves)
    return [(own, reference) for own, reference in pairs if reference is not None]


def _rows(found: Iterable[Compared | None]) -> list[dict[str, Any]]:
    """A table's rows as the summary has them."""
    return [asdict(one) for one in with_holm([one for one in found if one is not None])]


def _before(untouched: dict[str, Any]) -> dict[str, Any]:
    """Scores before the second task and, under ``start``, before the first one."""
    stages = {"": untouched, "start": untouched["start"]}
    found = {
        name: {
            "first": stage["first"]["scores"]["all"],
            "second": stage["scores"]["all"],
            "elsewhere": stage.get("elsewhere"),
        }
        for name, stage in stages.items()
    }
    return {**found[""], "start": found["start"]}


def _correlations(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of each explanation with each kind of forgetting, over the runs that did not diverge."""
    found: dict[str, dict[str, float | None]] = {}
    for figure_name in EXPLANATIONS:
        found[figure_name] = {}
        for forgot in FORGOT:
            pairs = [(run[figure_name], run[forgot]["mean"]) for run in runs]
            known = [pair for pair in pairs if None not in pair]
            found[figure_name][forgot] = spearman(*zip(*known, strict=True)) if len(known) > 2 else None
    return found


def _title(study: Study) -> str:
    first = [] if study.first is None else [study.first.data]
    data = [*first, *(one.data for one in study.between), study.shared["data"]]
    tasks = (", ".join(one["tasks"]) for one in data)
    replay = f", {study.replay} rows of the first task among those of the last" if study.replay else ""
    return f"{study.folder.name}: {', then '.join(tasks)}, with {study.shared['model']['name']}{replay}"


def _readme(study: Study, summary: dict[str, Any]) -> str:
    parts = [
        f"# {_title(study)}",
        f"Written by `smoa compare` from the stored runs; do not edit. {INTRODUCTION}",
        before_sentence(summary["before"]),
        f"![What was kept against what was learned](frontier.png)\n\n{CAPTION}"
        if sequence_chart(summary) is not None
        else "",
        *(
            f"## {one.title}\n\n{one.text}\n\n{markdown_table(one.header, one.lines)}"
            for one in table_sections(summary)
        ),
        "## Runs",
        markdown_table(RUNS_HEADER, [run_line(run) for run in summary["runs"]]),
        missing_sentence(study, [run["entry"] for run in summary["runs"]]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
