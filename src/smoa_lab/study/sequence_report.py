"""The summary of a sequence from its stored trials alone, its tables and its chart, and what is said about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from smoa.errors import DataError
from smoa_lab.basics.plain import finite
from smoa_lab.pages.tables import Cell, Table, number
from smoa_lab.pages.templates import Figure
from smoa_lab.study.charts import frontier
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.equal_learning import (
    Compared,
    Curve,
    at_equal_learning,
    at_lower_levels,
    at_next_rate,
    curve_of,
    least_gaps,
)
from smoa_lab.study.search import nearest_index, sweep_of
from smoa_lab.study.statistics import check_paired, corrected, spearman
from smoa_lab.study.study import Study
from smoa_lab.study.trials import PACK, Result, Trial, Untouched, shell_command

EXPLANATIONS = {
    "relative_norm": "‖ΔW‖_F / ‖W‖_F",
    "relative_spectral_norm": "‖ΔW‖₂ / ‖W‖₂",
    "stable_rank": "stable rank",
    "intruders": "intruder dimensions",
}
"""The figures of ΔW by which forgetting may be explained, as pages name them; each is the mean over layers."""
FORGOT = {"forgot": "first task", "forgot_elsewhere": "text elsewhere"}
TITLES = ("loss on the second task (nats per token)", "loss on the first task (nats per token)")
COMPARED_HEADER = ["minus the reference's", "", "p", "Holm's p", "by Holm"]
EQUAL_HEADER = ["entry", "level", "at rate", "loss kept", "the reference at", "its loss", *COMPARED_HEADER]
NEXT_HEADER = ["entry", "best rate", "next rate", "second loss", "loss kept", "its rise", *COMPARED_HEADER]
RUNS_HEADER = [
    *("run", "second loss", "accuracy %", "first loss", "accuracy %", "forgot", "forgot elsewhere"),
    *EXPLANATIONS.values(),
    "s",
]
INTRODUCTION = (
    "Every entry starts from the same model, trained on the first task, and trains the second one. Every rate is a "
    "run; nothing was tuned. Losses are of gold answers on the test parts, in nats per token. Forgot is the rise of a "
    "loss with its standard error, paired by question or text."
)
CAPTION = (
    "Lower left is better. A dot is a run, a point the mean over seeds; a line joins the points along an entry's "
    "learning rates. Dashed and hollow is the entry's reference. The dotted line is the loss before the second task. "
    "Runs that lost more than the frame shows are in the table."
)
EQUAL = (
    "The level is the lowest loss of the second task that both the entry and its reference reach: the higher one of "
    "their lowest losses. Both losses of an entry are interpolated linearly along the logarithm of its learning rate, "
    "from the lowest rate up, to where the second one comes down to the level. ≤: its lowest rate already learns more, "
    "and is taken. Only seeds count that both have. Intervals are of 95 %: questions of both tasks are resampled, and "
    "level and rates determined anew each time; over seeds Student's t, of the differences of single seeds, each at a "
    "level of its own. One seed gets no verdict. Holm's p-values are corrected for all comparisons of this table and "
    "the next. Least gap: how far the loss kept is above the lowest of all entries, at the level where that is least, "
    "of all levels that half of the entries reach."
)
LOWER = (
    "The same at each lower rate of the reference, where it learned less and forgot less: the level is its second-task "
    "loss there. Where its losses lie close together while it forgets ever more, this says more than its best rate."
)
ELSEWHERE = "As above, of the loss on the text elsewhere."
NEXT = (
    "Best is the rate of an entry's lowest second-task loss, next the one after it in the sweep. The losses are those "
    "at the next rate, the rise is that from the best rate. Differences compare entries at their own next rates. Which "
    "rate is the best is taken as known: intervals don't allow for another one being as good. Corrected for this table."
)
EXPLAINED = "Figures of ΔW are means over at most 18 layers. – : one of the two is the same in all runs."
WHERE = (
    "Every finished run. Its whole JSON is the file of that name in the study's folder under final/ or, once packed, a "
    f"line of {PACK}: "
)


def sequence_title(study: Study) -> str:
    """The tasks of a study in their order, and its model."""
    first = [] if study.first is None else [study.first.data]
    tasks = (", ".join(data["tasks"]) for data in (*first, *(t.data for t in study.between), study.shared["data"]))
    replay = f", {study.replay} rows of the first task among those of the last" if study.replay else ""
    return f"{study.folder.name}: {', then '.join(tasks)}, with {study.shared['model']['name']}{replay}"


def sequence_summary(comparison: Comparison) -> dict[str, Any]:
    """What ``summary.json`` has.

    Raises:
        DataError: no run is finished yet, or runs were asked different questions.
        ConfigError: a run was run with other settings than the study's.
    """
    study = comparison.study

    def finals(name: str) -> list[Result]:
        rates = sweep_of(study, name)
        return comparison.stored_finals(name, lambda rate: nearest_index(rate) in rates)

    runs = {name: finals(name) for name in study.entries}
    rows = [_run_row(name, study.entries[name].method, run) for name, of_entry in runs.items() for run in of_entry]
    if not rows:
        raise DataError(f"{study.folder}: no final run is finished yet; run smoa compare on this study first")
    every = [run for of_entry in runs.values() for run in of_entry]
    for run in every:
        check_paired(run, every[0])
    order = list(runs)
    rows.sort(key=lambda row: (order.index(row["entry"]), row["learning_rate"], row["seed"]))
    curves = [curve for name, of_entry in runs.items() if (curve := curve_of(name, of_entry))]
    away = [curve for name, of_entry in runs.items() if (curve := curve_of(name, of_entry, "elsewhere"))]
    untouched = comparison.stored(Untouched())
    before = untouched and {**_scores_before(untouched), "start": _scores_before(untouched["start"])}
    summary: dict[str, Any] = finite(
        {
            "before": before,
            **_comparisons(study, curves),
            "least_gaps": least_gaps(curves),
            "kept_elsewhere": _comparisons(study, away),
            "correlations": {
                figure: {forgot: _correlation(rows, figure, forgot) for forgot in FORGOT} for figure in EXPLANATIONS
            },
            "runs": rows,
        }
    )
    return summary


def _run_row(name: str, method: str, run: Result) -> dict[str, Any]:
    """A run in plain values; None for what a diverged one lacks."""
    training, second, first = run["config"]["training"], run["scores"]["all"], run["first"]["scores"]["all"]
    return {
        "entry": name,
        "method": method,
        "learning_rate": training["learning_rate"],
        "seed": training["seed"],
        "parameters": run["parameters"],
        "second_loss": second["gold_loss"],
        "second_accuracy": second["accuracy"],
        "first_loss": first["gold_loss"],
        "first_accuracy": first["accuracy"],
        "forgot": run["forgot"]["first"],
        "forgot_elsewhere": run["forgot"].get("elsewhere", {"mean": None, "stderr": None}),
        **{figure: None if run["change"] is None else run["change"][figure]["mean"] for figure in EXPLANATIONS},
        "seconds": run["seconds"],
    }


def _scores_before(stage: dict[str, Any]) -> dict[str, Any]:
    """Scores before the second task, or before the first one."""
    scores = {"first": stage["first"]["scores"]["all"], "second": stage["scores"]["all"]}
    return {**scores, "elsewhere": stage.get("elsewhere")}


def _comparisons(study: Study, curves: Sequence[Curve]) -> dict[str, list[dict[str, Any]]]:
    """Each entry against its reference at equal learning, at less learning, and one rate too high.

    The first two are corrected together, since they are one question at several levels.
    """
    by_entry = {curve.entry: curve for curve in curves}
    references = ((curve, by_entry.get(study.reference(curve.entry))) for curve in curves)
    pairs = [(curve, reference) for curve, reference in references if reference is not None]
    equal = [at_equal_learning(*pair) for pair in pairs]
    lower = [level for pair in pairs for level in at_lower_levels(*pair)]
    levels = _corrected([*equal, *lower])
    return {
        "equal": levels[: len(equal)],
        "lower_levels": levels[len(equal) :],
        "next_rate": _corrected(at_next_rate(*pair) for pair in pairs),
    }


def _corrected(rows: Iterable[Compared | None]) -> list[dict[str, Any]]:
    """A table's rows as the summary has them, corrected for all comparisons of the table."""
    known = [row for row in rows if row is not None]
    differences = corrected([row.difference for row in known])
    return [asdict(replace(row, difference=changed)) for row, changed in zip(known, differences, strict=True)]


def _correlation(rows: Sequence[dict[str, Any]], figure: str, forgot: str) -> float | None:
    """Spearman's correlation of a figure of ΔW with what was forgotten, over the runs that did not diverge."""
    pairs = [(row[figure], row[forgot]["mean"]) for row in rows]
    known = [pair for pair in pairs if None not in pair]
    return spearman(*zip(*known, strict=True)) if len(known) > 2 else None


def sequence_sections(
    summary: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[list[str], dict[str, Table | Figure]]:
    """Introduction, and the chart and tables under their headings, from the values of the summary. ``names`` are what
    the chart calls the entries."""
    away, before = summary["kept_elsewhere"], summary["before"]
    runs = [
        {
            "entry": names.get(run["entry"], run["entry"]),
            **{key: run[key] for key in ("method", "learning_rate", "seed")},
            "learned": run["second_loss"],
            "kept": run["first_loss"],
            "run": f"#{_name(run)}",
        }
        for run in summary["runs"]
    ]
    pairs = ((row[key] for key in ("entry", "reference")) for row in summary["equal"])
    references = dict([names.get(name, name) for name in pair] for pair in pairs)
    chart = frontier(runs, TITLES, before and before["first"]["gold_loss"], references)
    where = WHERE + shell_command(f"final/{summary['runs'][0]['entry']}/") if runs else ""
    gaps = [summary["least_gaps"].get(row["entry"]) for row in summary["equal"]]
    equal = [[*line, number(gap)] for line, gap in zip(_levels(summary["equal"]), gaps, strict=True)]
    explained = [
        [title, *(number(summary["correlations"][figure][forgot], 2) for forgot in FORGOT)]
        for figure, title in EXPLANATIONS.items()
    ]
    explained_header = ["Spearman's correlation over all runs with what was forgotten of the", *FORGOT.values()]
    tables = {
        "First task at equal learning of the second": Table([*EQUAL_HEADER, "least gap"], equal, EQUAL),
        "First task at less learning": Table(EQUAL_HEADER, _levels(summary["lower_levels"]), LOWER),
        "Text elsewhere at equal learning": Table(EQUAL_HEADER, _levels(away["equal"]), ELSEWHERE),
        "Text elsewhere at less learning": Table(EQUAL_HEADER, _levels(away["lower_levels"]), ELSEWHERE),
        "First task, one rate too high": Table(NEXT_HEADER, _next_rates(summary["next_rate"]), NEXT),
        "Text elsewhere, one rate too high": Table(NEXT_HEADER, _next_rates(away["next_rate"]), ELSEWHERE),
        "Explanations": Table(explained_header, explained, EXPLAINED),
        "Runs": Table(RUNS_HEADER, [_run_line(run) for run in summary["runs"]], where),
    }
    charts = {} if chart is None else {"Kept against learned": Figure(chart, CAPTION)}
    shown = {title: table for title, table in tables.items() if table.rows}
    return [INTRODUCTION, _before_sentence(before)], {**charts, **shown}


def _name(run: Mapping[str, Any]) -> str:
    return Trial("final", run["entry"], run["learning_rate"], run["seed"]).name


def _levels(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines under ``EQUAL_HEADER``."""
    lines = []
    for row in rows:
        readings = [
            text
            for read in (row["own"], row["other"])
            for text in (f"{'≤ ' if read['is_lowest'] else ''}{read['rate']:.2g}", number(read["kept_loss"]))
        ]
        lines.append([row["entry"], number(row["level"]), *readings, *_difference_cells(row)])
    return lines


def _next_rates(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines under ``NEXT_HEADER``."""
    lines = []
    for row in rows:
        losses = ["diverged", "", ""]
        if row["kept_loss"] is not None:
            losses = [number(row["learned_loss"]), number(row["kept_loss"]), f"{row['cost']:+.3f}"]
        lines.append([row["entry"], f"{row['best']:.2g}", f"{row['rate']:.2g}", *losses, *_difference_cells(row)])
    return lines


def _difference_cells(row: Mapping[str, Any]) -> list[str]:
    """Interval, verdict, p, Holm's p and the verdict by it."""
    difference = row["difference"]
    if difference is None:
        return ["", "reference" if row["entry"] == row["reference"] else "", "", "", ""]
    interval = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
    adjusted = "–" if difference["holm_p"] is None else f"{difference['holm_p']:.2g}"
    return [interval, difference["verdict"], f"{difference['p']:.2g}", adjusted, difference["holm_verdict"] or "–"]


def _run_line(run: Mapping[str, Any]) -> list[Any]:
    """The line under ``RUNS_HEADER``."""
    losses = [
        number(run[f"{task}_{score}"], digits, scale)
        for task in ("second", "first")
        for score, digits, scale in (("loss", 3, 1), ("accuracy", 1, 100))
    ]
    rises = [
        "–" if None in run[key].values() else f"{run[key]['mean']:+.3f} ± {run[key]['stderr']:.3f}" for key in FORGOT
    ]
    figures = ["–" if run[key] is None else f"{run[key]:.3g}" for key in EXPLANATIONS]
    return [Cell(_name(run), anchor=True), *losses, *rises, *figures, number(run["seconds"], 0)]


def _before_sentence(before: Mapping[str, Any] | None) -> str:
    """The scores before each of the tasks; nothing where they are unknown."""
    if before is None:
        return ""

    def losses(scores: Mapping[str, Any]) -> str:
        parts = [
            f"{task} {scores[task]['gold_loss']:.3f} ({100 * scores[task]['accuracy']:.1f} %)"
            for task in ("first", "second")
        ]
        parts += [] if scores["elsewhere"] is None else [f"elsewhere {scores['elsewhere']:.3f}"]
        return ", ".join(parts)

    return f"Loss (accuracy) before the first task: {losses(before['start'])}; after it: {losses(before)}."
