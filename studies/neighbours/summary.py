"""What the finished runs of this folder say: a table of each part, and of the checks.

    python studies/neighbours/summary.py [PART ...]    # prints them
    python studies/neighbours/summary.py --write       # writes tables.md, and into a folder of its name each part's
                                                       # report and runs, as stored.py stores other studies

Bounds are the lab's own, over the entries of a part that have all their seeds: 'worse by ≤' is by how much an entry is
at most worse than the best of the others.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run_parts import CHECKS, HERE, PARTS, WORK
from smoa_lab.study.planning import prepare
from smoa_lab.study.study_report import report
from stored import STUDIES, runs_of, store

from smoa_lab.pages.tables import Table
from smoa_lab.study.run_study import Comparison
from smoa_lab.study.search import rate_text
from smoa_lab.study.study import Study, load_study

COLUMNS = (
    "entry",
    "ΔW",
    "rank ≤",
    "trained",
    "s a step",
    "rate",
    "runs",
    "loss",
    "worse by ≤",
    "exact %",
    "worse by ≤ ",
)
MARKS = {"edge": " !", "cut": " !", "vertex": " ^"}


def form_of(method: str, adapter: Mapping[str, Any]) -> tuple[str, str]:
    """What an entry's ΔW is, with its sizes, and the bound of its rank in a layer of 576 × 576 whose blocks of W all
    have full rank."""
    r, K = int(adapter["r"]), int(adapter.get("num_blocks", 1))
    side, b = 576, int(adapter.get("blocks", 1))
    if method == "lora":
        return f"B A, r = {r}", f"{r}"
    if method == "shira":
        return "sparse, at random places", f"{side}"
    if method == "abba":
        half = r // 2
        return f"(B₁A₁) ⊙ (B₂A₂), r₁ = r₂ = {half}, α = {adapter['alpha']:g}", f"{half * half}"
    if method == "melora":
        return f"B A in {K} blocks, r_k = {r // K}", f"{r}"
    if method == "bhra":
        return f"W ⊙ (B A) in {b} × {b} blocks, b = {b}, r_b = {r // b}", f"{side}"
    blocks = "" if method == "hira" else f" in {K} blocks, r_k = {r // K}"
    return f"W ⊙ (B A){blocks}" + (f", r = {r}" if method == "hira" else ""), f"{side}"


def whole(study: Study) -> Comparison | None:
    """What ran of the entries that have all seeds; None if fewer than two do."""
    known = Comparison(study, prepare(study, None))
    finals = known.finals()
    left = {name: entry for name, entry in study.entries.items() if len(finals.get(name, ())) == len(study.seeds)}
    if len(left) < 2:
        return None
    part = study.model_copy(update={"entries": left})
    comparison = Comparison(part, prepare(part, None))
    comparison.catch_up([*left])
    return comparison


def table_of(name: str) -> Table | None:
    """A part's entries, best first, then those that have not run all seeds; None before the part was begun."""
    study = load_study(HERE / f"{name}.yaml")
    if not (study.folder / "plan.json").is_file():
        return None
    known = Comparison(study, prepare(study, None))
    known.catch_up([*study.entries])
    finished = whole(study)
    budget = finished.budgets()["all"] if finished else None
    worst = {one.entry: one.worst for one in budget.results} if budget else {}
    lines = []
    for entry in [*worst, *(entry for entry in study.entries if entry not in worst)]:
        own, chosen = [*known.finals().get(entry, {}).values()], known.searches().get(entry)
        timing = known.plan.entries[entry]
        scores = [run.metrics["evaluation"]["after"] for run in own]
        rate = "–" if chosen is None else rate_text(chosen.learning_rate) + MARKS.get(chosen.place, "")
        rate += "" if chosen is None or chosen.place != "open" else " so far"
        runs = f"{len(chosen.losses) if chosen else 0} + {len(own)}"
        of_loss = [score["loss"] for score in scores]
        of_exact = [100 * score["exact"] for score in scores if "exact" in score]
        bounds = [worst.get(entry, {}).get(title) for title in ("loss", "exact %")]
        lines.append(
            [
                entry,
                *form_of(study.entries[entry].method, study.entries[entry].adapter),
                f"{timing.parameters:,}",
                rate,
                runs,
                spread(of_loss, 4),
                "" if bounds[0] is None else f"{bounds[0]:+.4f}",
                spread(of_exact, 1),
                "" if bounds[1] is None else f"{bounds[1]:+.1f}",
            ]
        )
    columns = [*COLUMNS] if study.shared["data"].get("metric") else [*COLUMNS[:-2]]
    lines = [line[: len(columns)] for line in lines]
    level = f"Bounds at a level of {100 * budget.level:.2g} %" if budget else "No bounds yet"
    return Table(columns, lines, f"{level}; runs of the search + of fresh seeds.")


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    if any(value is None for value in values):
        return "diverged"
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def checks() -> str:
    """Whether LoRA and HiRA by neighbours.py came out as they did by PEFT."""
    lines, stored = [], runs_of(STUDIES / "chats-2")
    for method, (entry, _) in CHECKS.items():
        file = WORK / "check" / method / "metrics.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        rate = rate_text(found["config"]["training"]["learning_rate"])
        known = [
            run["evaluation"]["after"]["loss"] for name, run in stored.items() if name.startswith(f"{entry}/lr-{rate}-")
        ]
        own = found["evaluation"]["after"]["loss"]
        of_seed = stored[f"{entry}/lr-{rate}-seed-0"]["evaluation"]["after"]["loss"]
        lines.append(f"{method}, seed 0: {own:.4f}; stored, seed 0: {of_seed:.4f}; its seeds {spread(known, 4)}.")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    os.chdir(WORK)
    names = [word for word in words if word in PARTS] or [*PARTS]
    tables = {name: table for name in names if (table := table_of(name)) is not None}
    if "--write" not in words:
        print(checks())
        for name, table in tables.items():
            print(f"\n{name}: {table.caption}\n")
            print(table.markdown())
        return
    parts = [checks(), *(f"## {name}\n\n{table.caption}\n\n{table.markdown()}" for name, table in tables.items())]
    (HERE / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for name in tables:
        study = load_study(HERE / f"{name}.yaml")
        if (finished := whole(study)) is not None:
            report(finished)
            store(Path(study.folder), HERE / name)


if __name__ == "__main__":
    main(sys.argv[1:])
