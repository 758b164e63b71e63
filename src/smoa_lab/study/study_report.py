"""Writes a study's README.md, summary.json and picture, from its run folders alone.

A table or chart is made once. ``smoa compare`` prints it, README.md has it as Markdown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from smoa.atomic import write_whole
from smoa_lab.basics.plain import finite
from smoa_lab.basics.trust import TRUSTED
from smoa_lab.data.answers import ANSWERED, OWN, TITLES
from smoa_lab.pages.charts import save_picture
from smoa_lab.pages.tables import Table, counted, number, score_text
from smoa_lab.scoring.losses import Losses
from smoa_lab.study import study_charts
from smoa_lab.study.decision import EQUAL, Budget
from smoa_lab.study.metrics import METRICS, loss_of, read_metrics
from smoa_lab.study.plan import FIRST_SEEDS, Metrics
from smoa_lab.study.progress import Progress
from smoa_lab.study.results import FinalRun, read_rows
from smoa_lab.study.search import Chosen, rate_text
from smoa_lab.study.study import ALL_SIZES, FORMAT, series_of
from smoa_lab.study.verdict import verdict
from smoa_lab.training.run_folder import RunFolder

BUDGET = "Budget: "
MARKS = {"edge": " !", "cut": " !", "vertex": " ^"}
"""Behind a rate, where it lies in its search."""
DIFFERENCES, SIZES, MEASURED = "Differences", "Quality against size", "How it was measured"
PICTURE = "differences.png"
PICTURES = {DIFFERENCES: PICTURE, SIZES: "sizes.png"}
CAPTIONS = {
    DIFFERENCES: "What decides, with what it is at least and at most; filled points are better or worse for certain.",
    SIZES: (
        "What decides. Bars are one-sided bounds of the difference from the dotted line, that of the entry to take "
        "or of the smallest; filled points differ from it for certain. Methods of one size stand side by side. A gray "
        "line joins the best of neighboring sizes, where bounds show that they are."
    ),
}
INTRODUCTION = (
    "Every entry's learning rate is chosen by the loss on validation rows; the figures are from fresh seeds on the "
    "test part, in rounds of one seed of each entry. After each planned round from the second on it is asked which "
    "entries keep enough of what each other gained over the base model; the first of them in order of cost is "
    "taken, and the study ends. Bounds are one-sided, over seeds and groups of rows that belong together, at a "
    "level by which all planned looks together take a wrong entry in 4 % of studies at most, and all others in "
    "another 1 %. 'Worse by' is an entry's bound against the others; below 0 it is better than all. ! marks a best "
    "rate at the boundary of its search, over which nobody is taken; ^ one at the vertex of the parabola through the "
    "best that was tried and its neighbors. ± is the standard deviation over seeds; s a step is what was timed for "
    "the plan."
)
OLDER = (
    "It was planned by an older smoa: each row counts by itself, and seeds did not reach what some methods draw and "
    "don't train."
)
WHERE = (
    "A run's folder within the study's has its config, metrics, log and the losses of its rows. – is the time of one "
    "that was resumed: only that of its last part is known."
)


@dataclass(frozen=True)
class Figure:
    """A chart and what it shows."""

    chart: Any
    caption: str


@dataclass(frozen=True)
class Report:
    """What is known of a study: ``summary`` in plain values, the ``verdict`` in sentences, the tables and charts under
    their headings, and ``notes`` on how it was measured."""

    title: str
    summary: dict[str, Any]
    verdict: Sequence[str]
    notes: Sequence[str]
    sections: Mapping[str, Table | Figure]

    def results(self) -> dict[str, Table]:
        """The tables that a terminal shows, without the columns that it has no room for."""
        tables = {title: table for title, table in self.sections.items() if isinstance(table, Table)}
        own = {title: table for title, table in tables.items() if title.startswith(BUDGET)}
        for column in ("lr", "GB", "MB"):
            own = {title: table.without(column) for title, table in own.items()}
        return own

    def readme(self) -> str:
        """The Markdown, with the picture that lies beside it."""
        parts = [f"# {self.title}", "Written by `smoa compare` from the stored runs; do not edit."]
        parts += [f"**{sentence}**" for sentence in self.verdict]
        for title, content in self.sections.items():
            if isinstance(content, Table):
                parts += [f"## {title}", content.caption, content.markdown()]
            elif title in PICTURES:
                parts += [f"![{title}]({PICTURES[title]})", content.caption]
        return "\n\n".join([*parts, f"## {MEASURED}", *self.notes]) + "\n"


def report(comparison: Progress) -> Report:
    """Write ``README.md``, ``summary.json`` and the pictures of what has run into the study's
    folder."""
    study = comparison.study
    comparison.catch_up([*study.entries])
    families, untouched = comparison.budgets(), untouched_metrics(comparison)
    sentences, told = sentences_of(comparison, families)
    charts, searches, finals = charts_of(comparison, families), comparison.searches(), comparison.finals()
    figures = {title: Figure(chart, CAPTIONS[title]) for title, chart in charts.items() if chart is not None}
    results = [one for budget in families.values() if not budget.of_sizes for one in budget.results]
    made = Report(
        title=f"{study.folder.resolve().name}: {study.shared['model']['name']}",
        summary={
            "format": 4,
            "verdict": sentences,
            "entries": [one.as_json() for one in results],
            "budgets": {name: budget.as_json() for name, budget in families.items()},
            "untouched": untouched and untouched["evaluation"]["before"],
            "answers": answers(finals, untouched),
        },
        verdict=told,
        notes=notes_of(comparison, untouched),
        sections={
            **{title: figure for title, figure in figures.items() if title in PICTURES},
            **{f"{BUDGET}{name}": result_table(budget) for name, budget in families.items() if budget.has_table},
            **figures,
            **({"Learning rates": rate_table(searches)} if searches else {}),
            **({"Runs": run_table(comparison, finals)} if finals else {}),
        },
    )
    text = json.dumps(made.summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(study.folder / "summary.json", text + "\n")
    for title, file in PICTURES.items():
        if title in figures:
            save_picture(charts[title], study.folder / file)
    write_whole(study.folder / "README.md", made.readme())
    return made


def untouched_metrics(comparison: Progress) -> Metrics | None:
    """Those of the base model, with what the metric makes of its answers by now; None before it is scored."""
    run, metric = RunFolder(comparison.study.folder / "untouched"), comparison.metric
    if not run.finished:
        return None
    metrics = read_metrics(run)
    if metric in ANSWERED:
        values = [row["scored_before"] for row in read_rows(run, metric).values()]
        found, scores = Losses(values, [1] * len(values)), metrics["evaluation"]["before"]
        kept = {key: value for key, value in scores.items() if key.removesuffix("_stderr") not in ANSWERED}
        now = {metric: finite(found.mean), f"{metric}_stderr": finite(found.stderr)}
        metrics["evaluation"]["before"] = kept | now
    return metrics


def sentences_of(comparison: Progress, families: Mapping[str, Budget]) -> tuple[dict[str, list[str]], list[str]]:
    """The verdict of each family, and all that is said of the study, in the order in which it is shown."""
    study, plan = comparison.study, comparison.plan
    command = f"smoa compare {quote(study.file.as_posix())}"
    if comparison.metric == OWN:
        command += f" --metric {quote(plan.digests.get('metric', '').rpartition(' ')[0])}"
    command += " --trust-remote-code" if TRUSTED.trust_remote_code else ""
    further = comparison.unanswered() or [*study.entries]  # a lower tolerance asks again where all were answered
    of_round = sum(comparison.seconds("final", name) for name in further if name in plan.entries)
    of_round /= comparison.workers
    sentences = {name: verdict(budget, plan, command, of_round) for name, budget in families.items()}
    for name, budget in families.items():
        if name not in plan.takes and budget.family is not None and budget.decision() is None:
            earlier = [comparison.budgets(number).get(name) for number in plan.looked_at() if number < budget.round]
            if any(one is not None and one.decision() is not None for one in earlier):
                sentences[name][0] = f"No verdict yet: `{command}`, without --only, compares the rounds that there are."
    told = [" ".join([f"{name}:", *own][len(families) == 1 :]) for name, own in sentences.items()]
    remedy = "the same command tries again; or take it out of the study's file"
    told += [f"{name} failed: {error.rstrip('.')}; {remedy}." for name, error in plan.failed.items()]
    rows = {
        int(own.get("per_device_train_batch_size", 8)) * int(own.get("gradient_accumulation_steps", 1))
        for own in (config.training for config in comparison.configs.values())
    }
    if len(rows) > 1:
        each = f"{min(rows)} to {max(rows)} in each of the same number of steps"
        told.append(f"Entries see unequal numbers of rows: {each}.")
    if left := comparison.progress([*study.entries]):
        told.append(left)
    is_cut = comparison.is_over and left and command not in " ".join(told)
    if plan.limit is not None and (is_cut or (plan.listed and not told)):
        seeds = max(FIRST_SEEDS, len(plan.seeds))
        told.append(f"No more fits into {plan.minutes:g} minutes: `{command} --seeds {seeds}` goes on.")
    return sentences, told


def charts_of(comparison: Progress, families: Mapping[str, Budget]) -> dict[str, Any]:
    """The charts by their titles, None where there is nothing to draw."""
    study = comparison.study
    budgets = {name: budget for name, budget in families.items() if not budget.of_sizes}
    series = {name: series_of(name, entry.size) for name, entry in study.entries.items()}
    return {
        DIFFERENCES: study_charts.differences(budgets),
        SIZES: study_charts.sizes(families[ALL_SIZES], budgets, series) if ALL_SIZES in families else None,
    }


def notes_of(comparison: Progress, untouched: Metrics | None) -> list[str]:
    """How it was measured."""
    study, plan = comparison.study, comparison.plan
    notes = [] if untouched is None else [untouched_sentence(untouched["evaluation"]["before"])]
    notes += [INTRODUCTION, *([OLDER] if plan.format < FORMAT else [])]
    if comparison.metric == OWN:
        place, _, digest = plan.digests.get("metric", "").rpartition(" ")
        notes.insert(-1, f"The score is the mean of {place} over rows; SHA-256 of the file: {digest[:16]}.")
    if next(iter(comparison.configs.values())).data.recall:
        notes.append("All rows are in each part (data.recall): what is measured is what was learned by heart.")
    finals = comparison.finals()
    missing = [name for name in study.entries if name not in finals]
    notes += [f"Not run yet: {', '.join(missing)}."] if missing else []
    notes += [f"{name} is left out: {reason}." for name, reason in study.gaps.items()]
    if len({one.machine for one in plan.entries.values()}) > 1:
        notes.append("Steps were timed on several machines, so that parameters alone decide the order of cost.")
    return notes


def result_table(budget: Budget) -> Table:
    """The entries of a budget, what decides best first."""
    results = budget.results
    metrics = [METRICS[title] for title in results[0].values]
    header = ["entry", "trained", "lr", "seeds"]
    for each in metrics:
        header += [each.title, *(["worse by ≤"] if each.title in results[0].worst else [])]
    lines = []
    for one in results:
        rate = rate_text(one.chosen.learning_rate) + MARKS.get(one.chosen.place, "")
        share = "" if abs(one.share - 1) <= EQUAL else f" ({one.share:.0%})"
        line: list[Any] = [one.entry, f"{one.parameters:,}{share}", rate]
        line.append(str(len(one.seeds)))
        for each in metrics:
            mean, *spread = (f"{each.scale * value:.{each.digits}f}" for value in one.values[each.title])
            text = " ± ".join([mean, *spread][: len(one.seeds)])
            line.append("diverged" if one.diverged else text)
            if (most := one.worst.get(each.title)) is not None:
                line.append(f"{each.scale * most:+.{each.digits}f}" if math.isfinite(most) else "–")
        forgot = "–" if one.forgotten is None else f"{one.forgotten:+.4f}"
        sizes = [number(one.memory and one.memory / 1e9, 1), number(one.size and one.size / 1e6, 1)]
        lines.append([*line, forgot, number(one.step_seconds, 3), *sizes])
    rows, groups = counted(results[0].rows, "held-out row"), results[0].groups
    of_groups = "" if groups == results[0].rows else f" of {counted(groups, 'group')}"
    caption = (
        f"On {rows}{of_groups}, best first, after round {budget.round} of {max(budget.planned, budget.round)}, at a "
        f"level of {100 * budget.level:.2g} %; forgot is the change of the loss on general text, GB a run's memory at "
        "its peak, MB the adapter's size."
    )
    return Table([*header, "forgot", "s a step", "GB", "MB"], lines, caption)


def rate_table(searches: Mapping[str, Chosen]) -> Table:
    """The validation loss of each entry at each learning rate."""
    rates = sorted({rate for one in searches.values() for rate in one.losses})
    lines = []
    for name, one in searches.items():
        cells = []
        for rate in rates:
            loss, mark = one.losses.get(rate), " *" if rate == one.tried else ""
            cells.append("" if rate not in one.losses else "diverged" if loss is None else f"{loss:.3f}{mark}")
        chosen = "" if one.place == "open" else rate_text(one.learning_rate) + MARKS.get(one.place, "")
        lines.append([name, *cells, chosen])
    caption = (
        "Validation loss of each run of the search; * is the best that was tried, ^ the lowest point of a parabola, "
        "! at the boundary."
    )
    return Table(["entry", *map(rate_text, rates), "chosen"], lines, caption)


def run_table(comparison: Progress, finals: Mapping[str, Mapping[int, FinalRun]]) -> Table:
    """The lines that links lead to."""
    lines = []
    for run in (run for of_entry in finals.values() for run in of_entry.values()):
        training, made, loss = run.metrics["training"], run.metrics["provenance"], loss_of(run.metrics)
        name = run.folder.path.relative_to(comparison.study.folder).as_posix()
        reached = "diverged" if loss is None else f"{loss:.4f}"
        where = [made.get("device", "–"), (made.get("commit") or "–")[:7]]
        took = "–" if training.get("resumed") else f"{training['seconds']:.0f}"
        lines.append([name, reached, str(training["steps"]), took, *where])
    return Table(["run", "loss", "steps", "s", "machine", "commit"], lines, WHERE)


def answers(finals: Mapping[str, Mapping[int, FinalRun]], untouched: Metrics | None) -> list[dict[str, str]]:
    """For each sample prompt what was answered: the reference, the base model, and each entry."""
    before = {sample["question"]: sample.get("before") for sample in (untouched or {}).get("samples", [])}
    shown: dict[str, dict[str, str]] = {}
    for name, of_entry in finals.items():
        for sample in next(iter(of_entry.values())).metrics["samples"]:
            question = sample["question"]
            own = {"Prompt": question, "Reference": sample.get("reference"), "Untouched": before.get(question)}
            known = {title: text for title, text in own.items() if text is not None}
            shown.setdefault(question, known)[name] = sample["after"]
    return list(shown.values())


def untouched_sentence(scores: Mapping[str, Any]) -> str:
    """The base model's scores."""
    text = f"The base model: loss {number(scores['loss'], 4)}"
    text += "".join(f", {score_text(name, scores[name])}" for name in TITLES if name in scores)
    if scores.get("majority") is not None:
        text += f"; the commonest label is right in {100 * scores['majority']:.1f} %"
    return f"{text}."
