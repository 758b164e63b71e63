"""The page of a stored study on the site: its README.md with tables to sort, charts to point at, and every run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt
from html_page import Cell, Figure, SortedTable, page
from stored import Run, final_name, runs_of, summary_of

from smoa_lab.base_models import PACKAGED_MODELS, described_base
from smoa_lab.pages.charts import DASHES, METHODS, MUTED, PAPER, forest, values

LOOKS = {**METHODS, "corda": ("CorDA", "#60303c")}
"""Names and colors of methods, also of one that today's code doesn't train."""
EVERY_RUN = ["run", "loss", "accuracy %", "steps", "s", "machine", "commit"]
SIZES = ("r", "num_blocks", "alpha", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern")
"""Settings of an adapter that are left out of an entry's full name."""
USUAL = {"partition": "spectral", "modulation": "hadamard", "scale": "lora"}
"""Settings of SMoA that are its defaults."""
TITLES = ("loss on the second task (nats per token)", "loss on the first task (nats per token)")
SIDE = 190
"""Pixels of a side of a frontier's panel."""
TALLEST = 2.0
"""The frontier's frame ends so many nats above its lowest loss."""


def about_base(folder: Path) -> str:
    """What the base model of a study's runs is, if it isn't the one on the Hub by its name; else empty."""
    name = next(iter(runs_of(folder).values()))["config"]["model"]["name"]
    if name not in PACKAGED_MODELS:
        return ""
    base = described_base(name)
    return (
        f"The base model, {name}, was unpacked from 4-bit weights, {base.file}: they differ from those of "
        f"{base.hub_id} on the Hub."
    )


def study_page(folder: Path) -> str:
    """The HTML."""
    summary, runs = summary_of(folder), runs_of(folder)
    head, *parts = (folder / "README.md").read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")
    title, _, *introduction = head.removeprefix("# ").split("\n\n")
    sections: list[tuple[str, list[Any]]] = []
    for part in parts:
        heading, caption, content, *rest = part.split("\n\n")
        if content.startswith("!["):
            chart = frontier(summary, full_names(runs)) if isinstance(summary, dict) else differences(summary, runs)
            sections.append((heading, [Figure(chart, caption)]))
        else:
            sections.append((heading, [linked(heading, caption, content, summary, runs)]))
    if isinstance(summary, list):  # its runs are not in README.md, but what is said of them, after the last table
        sections.append(("Every run", [SortedTable(EVERY_RUN, [run_line(*each) for each in runs.items()], rest[0])]))
    return page(title, sections, [*introduction, *filter(None, [about_base(folder)])])


def linked(heading: str, caption: str, content: str, summary: Any, runs: Mapping[str, Run]) -> SortedTable:
    """A table of README.md whose cells lead to runs, and are sorted by their numbers."""
    header, _, *lines = ([*line[2:-2].split(" | ")] for line in content.split("\n"))
    rows: list[list[Any]] = [[*line] for line in lines]
    entries = {} if isinstance(summary, dict) else {row["entry"]: row for row in summary}
    for row in rows:
        if heading == "Runs":
            row[0] = Cell(row[0], anchor=True)
        elif heading.startswith("Budget: "):
            known = entries[row[0]]
            numbers = {1: known["parameters"], 5: known["loss"], 6: known["accuracy"]}
            for place, key in ((7, "loss_difference"), (9, "accuracy_difference")):
                numbers |= {place: known[key]["mean"]} if known[key] else {}
            for place, value in numbers.items():
                row[place] = Cell(row[place], math.nan if value is None else value)
            names = {str(seed): final_name(row[0], known["learning_rate"], seed) for seed in known["seeds"]}
            row[4] = Cell(row[4], links={seed: f"#{name}" for seed, name in names.items()})
        elif heading == "Learning rates":
            losses = {f"{float(rate):g}": loss for rate, loss in entries[row[0]]["search"]["losses"].items()}
            for place, rate in enumerate(header[1:], start=1):
                stem = f"tuning/{row[0]}/lr-{rate}-seed-"
                found = next((f"#{name}" for name in runs if name.startswith(stem)), None)
                links = {row[place]: found} if found and row[place] else {}
                row[place] = Cell(row[place], losses.get(rate), links=links)
    return SortedTable(header, rows, caption)


def run_line(name: str, run: Run) -> list[Any]:
    """A run under ``EVERY_RUN``."""
    scores, made = run["scores"]["all"], run.get("provenance", {})
    return [
        Cell(name, anchor=True),
        "diverged" if scores["gold_loss"] is None else f"{scores['gold_loss']:.4f}",
        f"{100 * scores['accuracy']:.1f}",
        *("–" if run.get(key) is None else f"{run[key]:g}" for key in ("steps", "seconds")),
        made.get("device", "–"),
        (made.get("commit") or "–")[:7],
    ]


def full_names(runs: Mapping[str, Run], budgets: Mapping[str, str] | None = None) -> dict[str, str]:
    """What charts call each entry: its method and, of SMoA, K and the settings that are not the defaults. Its own name
    is added where another one of its budget has the same."""
    names: dict[str, str] = {}
    for run in (run for name, run in runs.items() if name.startswith("final/")):
        entry, method, adapter = run["name"].split("/")[1], run["config"]["method"], run["config"].get("adapter", {})
        names[entry] = LOOKS.get(method, (method, MUTED))[0]
        if method == "smoa":
            changed = [
                f"{key}={adapter[key]}" for key in adapter if key not in SIZES and adapter[key] != USUAL.get(key)
            ]
            settings = ", ".join([f"K = {adapter.get('num_blocks', 2)}", *changed])
            names[entry] += f", {settings}{'' if changed else ' (default)'}"
    shown = {entry: (name, (budgets or {}).get(entry)) for entry, name in names.items()}
    uses = Counter(shown.values())
    alone = {entry for entry, name in names.items() if uses[shown[entry]] == 1 or entry == name.lower()}
    return {entry: name if entry in alone else f"{name}: {entry}" for entry, name in names.items()}


def differences(rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Run]) -> Any:
    """A forest plot for each budget: test losses minus the reference's, with interval and verdict in words."""
    names, compared = full_names(runs, {row["entry"]: row["budget"] for row in rows}), dict[str, list[dict[str, Any]]]()
    for row in rows:
        known = row["loss_difference"]
        if known is not None and known["mean"] is not None:
            by_holm = known["holm_verdict"] or known["verdict"]
            label = known["verdict"] + ("" if by_holm == known["verdict"] else f" (Holm: {by_holm})")
            compared.setdefault(row["budget"], []).append(
                {
                    "entry": names.get(row["entry"], row["entry"]),
                    "reference": names.get(row["reference"], row["reference"]),
                    "method": row["method"],
                    **{key: known[key] for key in ("low", "mean", "high")},
                    "difference": "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**known),
                    "verdict": label,
                    "clear": label in ("better", "worse"),
                    "run": f"#{final_name(row['entry'], row['learning_rate'], row['seeds'][0])}",
                }
            )
    titled = len({row["budget"] for row in rows}) > 1
    plots = [
        forest(own, f"test loss minus that of {own[0]['reference']} (nats per token); left is better")
        .encode(href="run:N", tooltip=tooltip(entry="", difference="", verdict=""))
        .properties(title=f"Budget: {budget}" if titled else "")
        for budget, own in compared.items()
    ]
    return alt.vconcat(*plots).resolve_scale(color="independent")


def frontier(summary: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """What was kept of the first task against what was learned of the second: a panel for each entry, beside the
    reference that it has."""
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for run in summary["runs"]:
        own = {
            "entry": names.get(run["entry"], run["entry"]),
            **{key: run[key] for key in ("method", "learning_rate", "seed")},
            "learned": run["second_loss"],
            "kept": run["first_loss"],
            "run": f"#{final_name(run['entry'], run['learning_rate'], run['seed'])}",
        }
        if None not in (own["learned"], own["kept"]):
            by_entry.setdefault(own["entry"], []).append(own)
    references = dict([names.get(row[key], row[key]) for key in ("entry", "reference")] for row in summary["equal"])
    before = summary["before"]["first"]["gold_loss"]
    known = [run for own in by_entry.values() for run in own]
    means = [point["kept"] for own in by_entry.values() for point in _means(own)]
    lowest = min(*means, before)
    top = min(max(*means, before) + 0.1, max(lowest + TALLEST, min(means) + 0.1))  # one mean at least is in the frame
    learned = [run["learned"] for run in known if run["kept"] <= top]
    scales = [alt.Scale(domain=ends, nice=False, padding=8) for ends in ([min(learned), max(learned)], [lowest, top])]
    axis = alt.Axis(tickCount=4, labelFlush=False)
    x = alt.X("learned:Q", title=TITLES[0], scale=scales[0], axis=axis)
    y = alt.Y("kept:Q", title=TITLES[1], scale=scales[1], axis=axis)
    beside = {reference for entry, reference in references.items() if entry in by_entry and entry != reference}
    panels = []
    for entry in (entry for entry in by_entry if entry not in beside):
        reference = references.get(entry, entry)
        others = by_entry.get(reference, []) if reference != entry else []
        rule = alt.Chart(values([{"kept": before}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y=y)
        curves = [*_curve(others, x, y, dashed=True), *_curve(by_entry[entry], x, y), rule]
        heading = alt.Title(entry, subtitle=f"hollow: {reference}" if others else "")
        panels.append(alt.layer(*curves).properties(width=SIDE, height=SIDE, title=heading))
    return alt.concat(*panels, columns=3)


def tooltip(**formats: str) -> list[alt.Tooltip]:
    """What pointing at a mark shows: fields in the order given, each with the format of its number (empty for text)."""
    return [
        alt.Tooltip(f"{field}:{'Q' if form else 'N'}", title=field.replace("_", " "), format=form)
        for field, form in formats.items()
    ]


def _curve(runs: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y, dashed: bool = False) -> list[Any]:
    """An entry's runs as dots, and their means by learning rate as points, on a line where they are more than two."""
    if not runs:
        return []
    means, color = _means(runs), LOOKS[runs[0]["method"]][1]
    mean = alt.Chart(values(means)).encode(x=x, y=y)
    line = mean.mark_line(color=color, strokeDash=DASHES[dashed], clip=True).encode(order="learning_rate:Q")
    shown = tooltip(entry="", learning_rate="~g", seed="", learned=".4f", kept=".4f")
    dots = alt.Chart(values(runs)).encode(x=x, y=y, tooltip=shown, href="run:N")
    return [
        *([line] if len(means) > 2 else []),
        mean.mark_point(color=color, size=60, fill=PAPER if dashed else color, opacity=1, clip=True),
        dots.mark_circle(color=color, size=14, opacity=0.6, clip=True),
    ]


def _means(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean losses of an entry at each of its rates, ascending."""
    points = []
    for rate, group in groupby(sorted(runs, key=itemgetter("learning_rate")), key=itemgetter("learning_rate")):
        seeds = list(group)
        means = {loss: fmean(run[loss] for run in seeds) for loss in ("learned", "kept")}
        points.append({"entry": seeds[0]["entry"], "learning_rate": rate, **means})
    return points
