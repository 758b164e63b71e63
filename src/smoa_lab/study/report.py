"""Writes a study's README.md, summary.json and pictures, from its file and its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from shlex import quote
from statistics import fmean
from typing import Any

import altair as alt

from smoa_lab.basics.files import write_whole
from smoa_lab.basics.settings import TRUSTED
from smoa_lab.basics.values import finite, json_text
from smoa_lab.data.answers import ANSWERED, OWN, TITLES, own_metric
from smoa_lab.pages.charts import colors, forest, name_of, save_picture, shapes, values
from smoa_lab.pages.tables import Table, counted, number, score_text
from smoa_lab.study.bounds import Family
from smoa_lab.study.finished import Finished, Metric, chosen, read_finished, scores_of, search
from smoa_lab.study.search import rate_text
from smoa_lab.study.study import Study
from smoa_lab.study.verdict import EQUAL, Verdict, sentences, verdict

SUMMARY = "summary.json"
MARKS = {"edge": " !", "vertex": " ^"}
"""Behind a rate, where it lies in its search."""
PICTURES = {
    "differences.png": "What decides, with what it is at least and at most; filled points differ for certain.",
    "sizes.png": "What decides against trained parameters; bars are the standard deviation over seeds.",
}
HOW = (
    "Every entry's learning rate is chosen by the loss on validation rows; the figures are from fresh seeds on the "
    "test part, in rounds of one seed of each entry. After each planned round from the second on, the first entry in "
    "order of cost is taken that keeps enough of what each other gained over the base model, and the study ends. "
    "Bounds are one-sided, over seeds and groups of rows; all planned looks together take a wrong entry in 4 % of "
    "studies at most, and all others in another 1 %. 'Worse by' is an entry's bound against the others; below 0 it is "
    "better than all. ! marks a best rate at the edge of its search, over which nobody is taken; ^ the vertex of a "
    "parabola. ± is the standard deviation over seeds; s a step the quickest run's."
)
OF_SIZES = (
    "Each budget is compared by itself, and errs by itself: the more there are, the likelier it is that one of the "
    "entries that are taken is a wrong one. Nothing is said of entries of two budgets."
)
RATES = "Validation loss by quarter decades from the first rate; ^ the lowest point of a parabola, ! at the boundary."


@dataclass(frozen=True)
class Report:
    """What is known: the verdict in sentences, a table of each budget, the ``summary`` in plain values."""

    verdict: Sequence[str]
    tables: Mapping[str, Table]
    summary: Mapping[str, Any]


def report(study: Study, failed: Mapping[str, str] | None = None) -> Report:
    """Write ``README.md``, ``summary.json`` and the pictures of what has run into the study's folder; ``failed`` are
    the errors that ended entries."""
    finished, failed = read_finished(study), failed or {}
    found = verdict(study, finished, failed)
    command = f"smoa compare {quote(study.folder.as_posix())}"
    command += f" --metric {quote(TRUSTED.metric)}" if TRUSTED.metric else ""
    told = []
    for name, one in found.items():
        told.append(" ".join([*([f"{name}:"] if len(found) > 1 else []), *sentences(one, command)]))
    for name, error in failed.items():
        told.append(f"{name} failed: {error.rstrip('.')}; the same command tries again, or take it out of the file.")
    tables = {f"Budget: {name}": result_table(one) for name, one in found.items() if one.families}
    parts = [f"# {study.folder.resolve().name}: {study.shared['model']['name']}"]
    parts += ["Written by `smoa compare` from the stored runs; do not edit.", *(f"**{each}**" for each in told)]
    for (file, caption), chart in zip(PICTURES.items(), (differences(found), sizes(found)), strict=True):
        if chart is not None:
            save_picture(chart, study.folder / file)
            parts += [f"![{file.removesuffix('.png')}]({file})", caption]
    of_rates = {"Learning rates": rate_table(study, finished)} if study.tuning.max_runs and finished else {}
    for title, table in {**tables, **of_rates}.items():
        parts += [f"## {title}", table.caption, table.markdown()]
    parts += ["## How it was measured", *notes(study, finished), HOW, *([OF_SIZES] if len(found) > 1 else [])]
    summary = finite({"verdict": told, "budgets": {name: plain(one) for name, one in found.items()}})
    write_whole(study.folder / SUMMARY, json_text(summary) + "\n")
    write_whole(study.folder / "README.md", "\n\n".join(parts) + "\n")
    return Report(told, tables, summary)


def metric_name(study: Study) -> str:
    """What decides: ``loss``, a metric, or a function of the user's with the digest of its file."""
    name = study.any_config.data.metric
    return own_metric().name if name == OWN else name or "loss"


def notes(study: Study, finished: Finished) -> list[str]:
    """What the base model reached, and where it was measured."""
    told = []
    if (run := finished.get("untouched")) is not None:
        scores = {name: score for name, score in scores_of(run.metrics).items() if name not in ANSWERED}
        if run.metric in ANSWERED:  # another than when they were stored may score the answers now
            scores[run.metric] = fmean(row["scored_before"] for row in run.rows.values())
        text = "".join(f", {score_text(name, scores[name])}" for name in TITLES if name in scores)
        told.append(f"The base model: loss {number(scores['loss'], 4)}{text}.")
    provenances = [run.metrics["provenance"] for run in finished.values()]
    for device, commit in sorted({(str(own.get("device")), str(own.get("commit"))) for own in provenances}):
        told.append(f"Runs were made on {device}, at commit {commit[:7]}.")
    if study.any_config.data.metric == OWN:
        told.append(f"The score is the mean over rows of {metric_name(study)} (SHA-256 of the file).")
    if study.any_config.data.recall:
        told.append("All rows are in each part (data.recall): what is measured is what was learned by heart.")
    return told


def result_table(of: Verdict) -> Table:
    """The entries of a budget, what decides best first."""
    several, header, lines = len(of.entries) > 1, ["entry", "trained", "lr"], []
    first = next(iter(of.families.values()))
    for metric in of.families:
        header += [metric.title, *(["worse by ≤"] if several else [])]
    for name in sorted(of.entries, key=lambda name: first.of_seeds(name).mean()):
        one, share = of.chosen[name], of.parameters(name) / of.parameters(of.against)
        trained = f"{of.parameters(name):,}{'' if abs(share - 1) <= EQUAL else f' ({share:.0%})'}"
        line = [name, trained, rate_text(one.learning_rate) + MARKS.get(one.place, "")]
        for metric, family in of.families.items():
            own, most = -metric.sign * metric.scale * family.of_seeds(name), metric.scale * family.worst(name)
            spread = "" if family.diverged(name) else f" ± {own.std(ddof=1):.{metric.digits}f}"
            line.append(f"{own.mean():.{metric.digits}f}{spread}" if spread else "diverged")
            line += [f"{most:+.{metric.digits}f}"] if several else []
        runs = [run.metrics for run in of.runs[name].values()]
        forgot: list[Any] = [(metrics["forgetting"] or {}).get("change") for metrics in runs]
        memory = max(metrics["training"].get("peak_memory") or 0 for metrics in runs)
        line.append("–" if None in forgot else f"{fmean(forgot):+.4f}")
        lines.append([*line, number(of.steps[name] or None), number(memory / 1e9 if memory else None, 1)])
    groups = len(first.weights)
    caption = (
        f"On {counted(of.rows, 'held-out row')}{'' if groups == of.rows else f' of {groups} groups'}, best first, "
        f"after round {of.round} of {max(of.study.planned, of.round)}, at a level of {100 * of.level:.2g} %; forgot is "
        "the change of the loss on general text, GB a run's memory at its peak."
    )
    return Table([*header, "forgot", "s a step", "GB"], lines, caption)


def rate_table(study: Study, finished: Finished) -> Table:
    """The validation loss of each entry by quarter decades from the rate that it names."""
    searches = {name: search(study, finished, name)[0] for name in study.entries}
    indices, lines = sorted({index for losses in searches.values() for index in losses}), []
    for name, losses in searches.items():
        texts = {index: "diverged" if loss is None else f"{loss:.3f}" for index, loss in losses.items()}
        one = chosen(study, finished, name)
        taken = rate_text(one.learning_rate) + MARKS.get(one.place, "") if one else ""
        first = rate_text(study.entries[name].learning_rate)
        lines.append([name, first, *(texts.get(index, "") for index in indices), taken])
    return Table(["entry", "first", *(f"{index:+d}" for index in indices), "chosen"], lines, RATES)


def plain(of: Verdict) -> dict[str, Any]:
    """A budget's verdict in plain values. Later commands read from it which looks were reported, and of what."""
    known: dict[str, Any] = {"take": of.take, "answered": of.is_answered, "round": of.round, "level": of.level}
    known |= {"added": of.added, "metric": metric_name(of.study), "done": of.done}
    if of.decides is None:
        return known
    decides, family = of.decides
    means = {name: float(family.of_seeds(name).mean()) for name in of.entries}
    entries = {
        name: {
            "parameters": of.parameters(name),
            "learning_rate": of.chosen[name].learning_rate,
            "seeds": [*of.runs[name]],
            "step_seconds": of.steps[name],
            "values": {m.title: [-m.sign * float(v) for v in each.of_seeds(name)] for m, each in of.families.items()},
            "worst": {metric.title: each.worst(name) for metric, each in of.families.items()},
        }
        for name in of.entries
    }
    pairs = [[*two, means[two[0]] - means[two[1]], family.upper(*two)] for two in permutations(of.entries, 2)]
    gains = {name: [-family.upper(name, None), -family.lower(name, None)] for name in of.entries}
    return known | {"measure": decides.title, "entries": entries, "pairs": pairs, "gains": gains}


def differences(found: Mapping[str, Verdict]) -> Any | None:
    """A forest plot for each budget: what decides minus that of the entry to take, or of the first in order of cost,
    with both one-sided bounds; None before there are any."""
    plots = []
    for budget, of in found.items():
        if of.decides is None or not (rows := _differences(of, *of.decides)):
            continue
        metric, side = of.decides[0], "left" if of.decides[0].sign < 0 else "right"
        axis = f"{metric.title} on held-out rows minus that of {of.against}; {side} is better"
        plots.append(forest(rows, axis).properties(title=f"Budget: {budget}" if len(found) > 1 else ""))
    return alt.vconcat(*plots).resolve_scale(color="independent") if plots else None


def _differences(of: Verdict, metric: Metric, family: Family) -> list[dict[str, Any]]:
    """A row of the plot for each entry that can be told from the one to which all are shown."""
    rows = list[dict[str, Any]]()
    for name in of.entries:
        mean = float(family.of_seeds(name).mean() - family.of_seeds(of.against).mean())
        ends = family.lower(name, of.against), family.upper(name, of.against)
        if name == of.against or not math.isfinite(mean) or not math.isfinite(sum(ends)):
            continue
        scale, digits = -metric.sign * metric.scale, metric.digits
        low, high = sorted(scale * end for end in ends)
        word = "better" if ends[1] < 0 else "worse" if ends[0] > 0 else "not told apart"
        method = of.study.entries[name].method
        row = {
            "entry": name_of(method) if name == name_of(method).lower() else f"{name_of(method)}: {name}",
            "method": method,
            "mean": scale * mean,
            "low": low,
            "high": high,
            "difference": f"{scale * mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            "verdict": word,
            "clear": word != "not told apart",
        }
        rows.append(row)
    return rows


def sizes(found: Mapping[str, Verdict]) -> Any | None:
    """What decides against trained parameters, a line for each method, with the standard deviation over seeds; None
    where fewer than two budgets have results."""
    known, points = [(of, *of.decides) for of in found.values() if of.decides], list[dict[str, Any]]()
    if len(known) < 2:
        return None
    for of, metric, family in known:
        for name in (name for name in of.entries if not family.diverged(name)):
            own = -metric.sign * metric.scale * family.of_seeds(name)
            mean, spread = float(own.mean()), float(own.std(ddof=1))
            point = {"method": of.study.entries[name].method, "parameters": of.parameters(name), "mean": mean}
            points.append({**point, "low": mean - spread, "high": mean + spread})
    methods = {point["method"]: point["method"] for point in points}
    ticks = sorted({point["parameters"] for point in points})
    x = alt.X("parameters:Q", title="trained parameters", scale=alt.Scale(type="log", nice=False, padding=30))
    x = x.axis(format=".3~s", values=ticks, labelOverlap=True)
    y = alt.Y("mean:Q", scale=alt.Scale(zero=False), title=f"{known[0][1].title} on held-out rows")
    chart = alt.Chart(values(points)).encode(x=x, y=y, color=colors(methods, "method", alt.Legend(title=None)))
    marks = chart.mark_point(size=90, filled=True, opacity=1).encode(shape=shapes(methods, "method"))
    bars = chart.mark_rule().encode(y="low:Q", y2="high:Q")
    return alt.layer(chart.mark_line(), bars, marks).properties(width=480, height=260)
