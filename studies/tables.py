"""The tables that pages show of the stored studies. `docs/generate.py` writes them, each between marks of its name.

The twenty planned tests are shown in two tables, ten in each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import again
import calibration
import rate_ratio
from stored import STUDIES, folders, setup_of, summary_of

from smoa_lab.pages.tables import Table

BARELY = 0.045
"""A significant difference with a larger p than this is called one barely."""


@dataclass(frozen=True)
class Values:
    """What SMoA and LoRA reached, SMoA minus LoRA, its 95 % interval, Holm's p and what Holm's correction leaves."""

    smoa: float
    lora: float
    difference: float
    low: float
    high: float
    p: float
    verdict: str


@dataclass(frozen=True)
class Compared:
    """SMoA against LoRA in one measure of a study of classification or answers: ``loss``, or ``accuracy`` in %."""

    measure: str
    smoa: str
    lora: str = "lora"

    @property
    def form(self) -> tuple[int, int]:
        """The factor that a value is shown with, and the digits behind its point."""
        return (100, 1) if self.measure == "accuracy" else (1, 3)

    def values(self, summary: list[dict[str, Any]]) -> Values:
        rows = {row["entry"]: row for row in summary}
        smoa, lora, key = rows[self.smoa], rows[self.lora], f"{self.measure}_difference"
        factor, is_reference = self.form[0], smoa["reference"] == self.smoa
        found = lora[key] if is_reference else smoa[key]
        mean, *ends = (factor * found[name] * (-1 if is_reference else 1) for name in ("mean", "low", "high"))
        verdict = {"better": "worse", "worse": "better"}.get(found["holm_verdict"]) if is_reference else None
        of_smoa, of_lora = factor * smoa[self.measure], factor * lora[self.measure]
        return Values(of_smoa, of_lora, mean, min(ends), max(ends), found["holm_p"], verdict or found["holm_verdict"])


@dataclass(frozen=True)
class Forgot:
    """What SMoA and LoRA forgot of the first task in a study of two tasks: in a ``part`` of the summary."""

    part: str
    form = 1, 3

    def values(self, summary: dict[str, Any]) -> Values:
        (row,) = (row for row in summary[self.part] if row["entry"] == "smoa-k8" and row["difference"])
        found, kept = row["difference"], row["own"]["kept_loss"] if "own" in row else row["kept_loss"]
        forgot = kept - summary["before"]["first"]["gold_loss"]
        mean, low, high = found["mean"], found["low"], found["high"]
        return Values(forgot, forgot - mean, mean, low, high, found["holm_p"], found["holm_verdict"])


Row = tuple[str, str, Compared | Forgot]
"""A title, a study and what is compared in it."""
OF_THE_VERDICT: list[Row] = [
    ("Loss, commonsense mixture, Gemma", "commonsense", Compared("loss", "smoa-k8-r1", "lora-r1")),
    ("The same, LoRA r = 2", "commonsense-float32", Compared("loss", "smoa-k8-r2", "lora-r2")),
    ("Loss, headlines, MiniLM, finer rates", "headlines-refined", Compared("loss", "smoa-k8")),
    ("Loss, CommonsenseQA, Gemma", "which-blocks", Compared("loss", "smoa-spectral")),
    ("512 pairs recalled (%), MiniLM", "recall-512", Compared("accuracy", "smoa-k8")),
    ("512 numbers recalled (%), SmolLM2", "phonebook-512", Compared("accuracy", "smoa-spectral")),
    ("The same, LoRA r = 2", "phonebook-512", Compared("accuracy", "smoa-spectral-r2", "lora-r2")),
    ("Facts in a new phrasing (%), SmolLM2", "biographies-64", Compared("accuracy", "smoa-spectral")),
    ("Forgot, SmolLM2", "retention-smollm2", Forgot("equal")),
    ("Forgot, SmolLM2, rate too high", "retention-smollm2", Forgot("next_rate")),
]
OTHERS: list[Row] = [
    ("Loss, headlines, MiniLM", "headlines", Compared("loss", "smoa-k8")),
    ("Accuracy (%), CommonsenseQA, Gemma", "which-blocks", Compared("accuracy", "smoa-spectral")),
    ("256 pairs recalled (%), Gemma", "recall-gemma-256", Compared("accuracy", "smoa-k8")),
    ("256 numbers recalled (%), SmolLM2", "phonebook-256", Compared("accuracy", "smoa-spectral")),
    ("The same, LoRA r = 2", "phonebook-256", Compared("accuracy", "smoa-spectral-r2", "lora-r2")),
    ("Facts about 256 people (%), SmolLM2", "biographies-256", Compared("accuracy", "smoa-spectral")),
    ("Forgot, SmolLM2, tasks swapped", "retention-smollm2-reversed", Forgot("equal")),
    ("Forgot, SmolLM2, 1 in 11 rows old", "retention-replay", Forgot("equal")),
    ("Forgot, Gemma", "retention-seeds", Forgot("equal")),
    ("Forgot, Gemma, rate too high", "retention-seeds", Forgot("next_rate")),
]
BY_COMPARE = {"400 conversations, loss": "chats-2", "Sums, right answers (%)": "chain-sum", "GSM8K, loss": "gsm8k"}
"""What `smoa compare` found under today's rules: a title and a study."""
VERDICTS = ("better", "same", "worse", "one seed")
RECALLED = {"random pairs", "phone book"}
SIDES = {"two": "both sides", "one": "one side", "few": "two seeds of two"}
BEFORE = {"2, 3": ("2.7", "6.8"), "2, 4": ("1.6", "6.3"), "4, 3": ("2.3", "5.2"), "4, 4": ("2.1", "5.3")}
"""By loss and with a wild entry, by the numbers of entries and rounds: what docs/results.md said at aa0fbca9."""


def link(title: str, study: str) -> str:
    """The title, as a link where the study's report is in this repository."""
    return f"[{title}](../studies/{study}/README.md)" if (STUDIES / study).is_dir() else title


def studies() -> str:
    """Each study with a summary: what its final runs trained, and what came out."""
    header = ["study", "model", "tasks", "entries", "better, same or worse"]
    return Table(header, list(map(_study, folders()))).markdown(["---"] * len(header))


def _study(folder: Path) -> list[str]:
    setup, summary = setup_of(folder.name), summary_of(folder.name)
    is_sequence = isinstance(summary, dict)
    entries = {row["entry"] for row in (summary["runs"] if is_sequence else summary)}
    measure = "accuracy" if set(setup["tasks"]) & RECALLED else "loss"
    return [
        link(folder.name, folder.name),
        f"{setup['model']}, {setup['dtype']}",
        f"{', '.join(setup['tasks'])}: {setup['train_examples']} examples, {' to '.join(map(str, setup['steps']))} "
        f"steps of {setup['batch_size']}, {setup['questions']} questions",
        f"{len(entries)}",
        "–" if is_sequence else verdicts(summary, measure),
    ]


def verdicts(rows: list[dict[str, Any]], measure: str) -> str:
    """How many entries of each budget are better, the same and worse than the reference, after Holm's correction."""
    told = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == budget]
        found = [each for row in own if (each := row[f"{measure}_difference"])]
        words = [each["holm_verdict"] or each["verdict"] for each in found]
        counts = ", ".join(f"{count} {word}" for word in VERDICTS if (count := words.count(word)))
        told += [f"{budget}, to {own[0]['reference']}: {counts}"] if counts else []
    return "; ".join(told)


def planned() -> str:
    return _planned(OF_THE_VERDICT)


def other_planned() -> str:
    return _planned(OTHERS)


def _planned(rows: list[Row]) -> str:
    header = ["measure", "SMoA", "LoRA", "difference", "Holm's p", "result"]
    return Table(header, [_test(*row) for row in rows]).markdown()


def _test(title: str, study: str, what: Compared | Forgot) -> list[str]:
    values = what.values(summary_of(study))
    smoa, lora = (f"{number:.{what.form[1]}f}" for number in (values.smoa, values.lora))
    difference = signed(values.difference, values.low, values.high, what.form[1])
    winner = {"better": "SMoA is better", "worse": "LoRA is better"}.get(values.verdict)
    result = "not significant" if winner is None else winner + (", barely" if values.p > BARELY else "")
    return [link(title, study), smoa, lora, difference, f"{values.p:.2g}", result]


def signed(difference: float, low: float, high: float, digits: int) -> str:
    """A difference with its interval, as in "+0.023 [−0.011, +0.060]"; what rounds to zero has no sign."""
    texts = [f"{value:+.{digits}f}".replace("-", "−") for value in (difference, low, high)]
    shown = [re.sub(r"^[+−](0\.0+)$", r"\1", text) for text in texts]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def compared() -> str:
    """What decides in each study of `BY_COMPARE`: what LoRA reached, and the others minus LoRA."""
    rows = []
    for title, study in BY_COMPARE.items():
        results = json.loads((STUDIES / study / "results.json").read_text(encoding="utf-8"))
        entries, budget = {one["entry"]: one for one in results["entries"]}, results["budgets"]["all"]
        measure, covers = budget["measure"], 100 - 100 * budget["level"]
        name = title if covers == 95 else f"{title}; intervals of {covers:g} %"
        factor, digits = (1, 3) if measure == "loss" else (100, 1)
        lora = f"{factor * entries['lora']['values'][measure][0]:.{digits}f}"
        found = [entries[other]["differences"][measure] for other in ("smoa", "dora", "hira")]
        cells = [signed(factor * own["mean"], factor * own["low"], factor * own["high"], digits) for own in found]
        rows.append([link(name, study), lora, *cells])
    return Table(["what decides", "LoRA", "SMoA − LoRA", "DoRA − LoRA", "HiRA − LoRA"], rows).markdown()


def simulated() -> dict[str, Any]:
    """What `calibration.py` found."""
    found: dict[str, Any] = json.loads(calibration.FILE.read_text(encoding="utf-8"))
    return found


def missed_bounds() -> str:
    columns = [
        (kind, side)
        for kind in ("even", "skewed", "uneven", "right")
        for side in SIDES
        if side != "few" or kind in ("even", "skewed")
    ]
    rows = [
        [str(row["groups"]), *(f"{100 * row[kind][side]:.1f}" for kind, side in columns)] for row in simulated()["rows"]
    ]
    return Table(["groups", *(f"{kind}, {SIDES[side]}" for kind, side in columns)], rows).markdown()


def whole_studies() -> str:
    rows, found = [], simulated()["whole"]
    for key in sorted({*found, *BEFORE}):
        now, before = found.get(key), BEFORE.get(key, ("–", "–"))
        shares = [f"{100 * now[name]:.1f}" if now else "–" for name in ("wrong", "right", "wild", "harmful")]
        rows.append([*key.split(", "), *shares, *before])
    header = ["entries", "rounds", "loss", "right answers", "wild", "harmful", "loss, before", "wild, before"]
    return Table(header, rows).markdown()


def wild_pairs() -> str:
    rows, found = [], simulated()
    for entries in map(str, calibration.ENTRIES):
        wild = ", ".join(f"{100 * each[entries]['two']:.1f}" for each in found["wild"].values())
        widths = ", ".join(f"{each:.2f}" for key, each in found["widths"].items() if key.startswith(f"{entries},"))
        rows.append([entries, wild, widths])
    return Table(["entries", "wild pair", "width"], rows).markdown()


def replayed() -> str:
    """The stored studies of `smoa compare` in every order of their seeds."""
    found = json.loads(again.REPLAY.read_text(encoding="utf-8"))
    rows = [
        [link(name, name), _counts(one["rounds"]), _counts(one["takes"]), f"{one['minutes']:.2f}"]
        for name, one in found.items()
    ]
    return Table(["study", "ended after round", "took", "minutes"], rows).markdown()


def _counts(orders: dict[str, int]) -> str:
    return ", ".join(f"{what}: {number} of {sum(orders.values())}" for what, number in orders.items())


def searches() -> str:
    rows = [
        [rule, f"{one['runs']:.2f}", f"{one['regret']:.4f}", f"{one['regret_in_spreads']:.2f}"]
        for rule, one in simulated()["searches"].items()
    ]
    return Table(["search", "runs a method", "regret", "in sd of seeds"], rows).markdown()


BLOCKS: dict[str, Callable[[], str]] = {
    "studies": studies,
    "planned": planned,
    "other planned": other_planned,
    "compared": compared,
    "missed bounds": missed_bounds,
    "whole studies": whole_studies,
    "wild pairs": wild_pairs,
    "replayed": replayed,
    "searches": searches,
    "rates": rate_ratio.table,
}
