"""Writes a study's README.md, index.html, summary.json and picture, from its run folders alone.

A table or chart is made once. ``smoa compare`` prints it, README.md has it as Markdown, and the page as HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoa.atomic import write_whole
from smoa_lab.pages.charts import save_picture
from smoa_lab.pages.tables import Cell, Table, counted, number
from smoa_lab.pages.templates import Figure, page
from smoa_lab.study import charts
from smoa_lab.study.comparison import Comparison, measured, read_metrics
from smoa_lab.study.plan import Metrics
from smoa_lab.study.results import MEASURES, FinalRun, Result, as_json, final_runs, results_of
from smoa_lab.study.search import rate_text
from smoa_lab.study.verdict import EQUAL, verdict
from smoa_lab.training.run_folder import RunFolder

BUDGET = "Budget: "
MARKS = {"edge": " !", "vertex": " ^"}
"""Behind a rate, where it lies in its search."""
PICTURE = "differences.png"
ANSWERS = "Greedy answers to the first held-out prompts, each entry's of its first seed."
CAPTIONS = {
    "Differences": "What decides minus the reference's; filled points differ after Holm's correction too.",
    "Searches": "Validation loss at each learning rate that was tried; a dashed line is at a vertex that was chosen.",
    "Loss and time": "Training loss of each entry's first seed, against the seconds of its training.",
    "Learned and forgotten": "Loss on held-out rows against the change of the loss on general text.",
}
INTRODUCTION = (
    "Every entry's learning rate is chosen on validation rows by the same search; the figures are from fresh seeds on "
    "the test part. Differences are to the reference of the same budget, paired by seed and row, with 95 % intervals "
    "(rows resampled, Student's t over seeds, whose variance is that of all entries together). 'Same' means that the "
    "interval includes 0; '(Holm: same)' that Holm's correction takes the verdict back: for all comparisons of the "
    "table by what decides, and apart from these for all by other measures; 'open' that the worse one's best rate "
    "lies at the edge of its search, marked with !; ^ marks a rate at the vertex of the parabola through the best "
    "that was tried and its neighbors. One seed gets no verdict. ± is the standard deviation over seeds; s a step are "
    "seconds on the machine that ran most of the runs."
)
WHERE = "A run's folder within the study's has its config, metrics, log and the losses of its rows."


@dataclass(frozen=True)
class Report:
    """What is known of a study: ``summary`` in plain values, the ``verdict`` in sentences, and the tables and charts
    under their headings; charts other than the first are on the page only."""

    title: str
    summary: dict[str, Any]
    verdict: Sequence[str]
    introduction: Sequence[str]
    sections: Mapping[str, Table | Figure]

    def results(self) -> dict[str, Table]:
        """The tables that a terminal shows, without the columns that it has no room for."""
        tables = {title: table for title, table in self.sections.items() if isinstance(table, Table)}
        return {
            title: table.without("lr").without("runs") for title, table in tables.items() if title.startswith(BUDGET)
        }

    def page(self) -> str:
        sections: list[tuple[str, Sequence[Any]]] = [(title, [content]) for title, content in self.sections.items()]
        answers = [
            {name: text.strip() or "(nothing)" for name, text in each.items()} for each in self.summary["answers"]
        ]
        if answers:
            sections.insert(-1, ("Answers", [ANSWERS, *answers]))
        return page(self.title, sections, [*self.verdict, *self.introduction])

    def readme(self) -> str:
        """The Markdown, with the picture that lies beside it."""
        parts = [f"# {self.title}", "Written by `smoa compare` from the stored runs; do not edit.", *self.verdict]
        parts += self.introduction
        for title, content in self.sections.items():
            if isinstance(content, Table):
                parts += [f"## {title}", content.caption, content.markdown()]
            elif title == "Differences":
                parts += [f"## {title}", content.caption, f"![{title}]({PICTURE})"]
        return "\n\n".join(parts) + "\n"


def report(comparison: Comparison) -> Report:
    """Write ``README.md``, ``index.html``, ``summary.json`` and the picture into the study's folder."""
    folder, finals = comparison.study.folder, final_runs(comparison)
    results = results_of(comparison, finals)
    as_it_is = RunFolder(folder / "untouched")
    untouched = read_metrics(as_it_is) if as_it_is.finished else None
    loss = None if untouched is None else untouched["evaluation"]["before"]["loss"]
    budgets: dict[str, list[Result]] = {}
    for one in results:
        budgets.setdefault(one.budget, []).append(one)
    sentences = {budget: verdict(own, loss) for budget, own in budgets.items()}
    sections: dict[str, Table | Figure] = {f"{BUDGET}{budget}": result_table(own) for budget, own in budgets.items()}
    drawn = (
        charts.differences(results),
        charts.searches(results),
        charts.losses(results, finals),
        charts.learned_and_forgotten(results, loss),
    )
    for (title, caption), chart in zip(CAPTIONS.items(), drawn, strict=True):
        sections |= {} if chart is None else {title: Figure(chart, caption)}
    sections |= {"Learning rates": rate_table(results)} if any(one.chosen.losses for one in results) else {}
    sections["Runs"] = run_table(comparison, finals)
    missing = [name for name in comparison.study.entries if name not in finals]
    notes = [*untouched_sentence(untouched), INTRODUCTION]
    notes += [f"Not run yet: {', '.join(missing)}."] if missing else []
    made = Report(
        title=f"{folder.resolve().name}: {comparison.study.shared['model']['name']}",
        summary={
            "format": 2,
            "verdict": sentences,
            "entries": as_json(results),
            "untouched": untouched and untouched["evaluation"]["before"],
            "answers": answers(finals, untouched),
        },
        verdict=[" ".join([f"{budget}:", *own][len(budgets) == 1 :]) for budget, own in sentences.items() if own],
        introduction=notes,
        sections=sections,
    )
    write_whole(folder / "summary.json", json.dumps(made.summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if "Differences" in sections:
        save_picture(drawn[0], folder / PICTURE)
    write_whole(folder / "README.md", made.readme())
    write_whole(folder / "index.html", made.page())
    return made


def result_table(results: Sequence[Result]) -> Table:
    """The entries of a budget, what decides best first."""
    reference = results[0].reference
    measures = [MEASURES[title] for title in results[0].values]
    header = ["entry", "trained", "lr", "runs", "seeds", *(each.title for each in measures)]
    for each in measures:
        header += [f"{each.title} − {reference}", ""]
    lines = []
    for one in results:
        rate = rate_text(one.chosen.learning_rate) + MARKS.get(one.chosen.place, "")
        links = {str(seed): charts.final_run(one, seed) for seed in one.seeds}
        share = "" if abs(one.share - 1) <= EQUAL else f" ({one.share:.0%})"
        line: list[Any] = [one.entry, Cell(f"{one.parameters:,}{share}", one.parameters)]
        line += [rate, len(one.chosen.losses), Cell(str(len(one.seeds)), links=links)]
        for each in measures:
            mean, spread = (each.scale * value for value in one.values[each.title])
            text = (
                f"{mean:.{each.digits}f}"
                if len(one.seeds) == 1
                else f"{mean:.{each.digits}f} ± {spread:.{each.digits}f}"
            )
            line.append(Cell(text if math.isfinite(mean) else "diverged", mean))
        for each in measures:
            difference = one.differences.get(each.title)
            if difference is None:  # of the reference, and before a seed of it is finished
                line += ["", "reference" if one.entry == reference else ""]
            else:
                pairs = "" if one.paired == one.seeds else f", {counted(len(one.paired), 'pair')}"
                line += [Cell(difference.signed(each.scale, each.digits), difference.mean), difference.label + pairs]
        forgot = "–" if one.forgotten is None else f"{one.forgotten:+.4f}"
        lines.append([*line, forgot, number(one.step_seconds, 3)])
    rows = counted(results[0].rows, "held-out row")
    caption = f"On {rows}, best first; forgot is the change of the loss on general text."
    return Table([*header, "forgot", "s a step"], lines, caption)


def rate_table(results: Sequence[Result]) -> Table:
    """The validation loss of each entry at each learning rate."""
    rates = sorted({rate for one in results for rate in one.chosen.losses})
    lines = []
    for one in results:
        losses, cells = one.chosen.losses, []
        for rate in rates:
            loss, mark = losses.get(rate), " *" if rate == one.chosen.tried else ""
            cells.append("" if rate not in losses else "diverged" if loss is None else f"{loss:.3f}{mark}")
        lines.append([one.entry, *cells, rate_text(one.chosen.learning_rate) + MARKS.get(one.chosen.place, "")])
    caption = "Validation loss of each run of the search; * is the best that was tried, ^ a vertex, ! at the edge."
    return Table(["entry", *map(rate_text, rates), "chosen"], lines, caption)


def run_table(comparison: Comparison, finals: Mapping[str, Mapping[int, FinalRun]]) -> Table:
    """The lines that links lead to."""
    lines = []
    for run in (run for of_entry in finals.values() for run in of_entry.values()):
        training, made = run.metrics["training"], run.metrics["provenance"]
        name = run.folder.path.relative_to(comparison.study.folder).as_posix()
        loss = measured(run.metrics)
        times = [str(training["steps"]), f"{training['seconds']:.0f}"]
        lines.append(
            [
                Cell(name, anchor=True),
                "diverged" if loss is None else f"{loss:.4f}",
                *times,
                made.get("device", "–"),
                (made.get("commit") or "–")[:7],
            ]
        )
    return Table(["run", "loss", "steps", "s", "machine", "commit"], lines, WHERE)


def answers(finals: Mapping[str, Mapping[int, FinalRun]], untouched: Metrics | None) -> list[dict[str, str]]:
    """For each sample prompt what was answered: the reference, the untouched model, and each entry."""
    firsts = {name: next(iter(of_entry.values())).metrics["samples"] for name, of_entry in finals.items()}
    before = {sample["question"]: sample.get("before") for sample in (untouched or {}).get("samples", [])}
    shown: dict[str, dict[str, str]] = {}
    for name, samples in firsts.items():
        for sample in samples:
            question = sample["question"]
            own = {"Prompt": question, "Reference": sample.get("reference"), "Untouched": before.get(question)}
            known = {title: text for title, text in own.items() if text is not None}
            shown.setdefault(question, known)[name] = sample["after"]
    return list(shown.values())


def untouched_sentence(untouched: Metrics | None) -> list[str]:
    """The untouched model's scores; nothing where it was not scored."""
    if untouched is None:
        return []
    scores = untouched["evaluation"]["before"]
    text = f"The untouched model: loss {number(scores['loss'], 4)}"
    if "accuracy" in scores:
        text += f", accuracy {100 * scores['accuracy']:.1f} %"
    if scores.get("majority") is not None:
        text += f"; the commonest label is right in {100 * scores['majority']:.1f} %"
    return [f"{text}."]
