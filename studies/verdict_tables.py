"""The tables of the planned tests, and of what `smoa compare` found; results_page.py writes them.

Ten tests are in docs/verdict.md, between `<!-- begin planned -->` and `<!-- end planned -->`, and what was found is
between marks of its own; the rest of that page is written by hand. The other ten tests are in docs/results.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stored import STUDIES, summary_of

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
HEADER = ["measure", "SMoA", "LoRA", "difference", "Holm's p", "result"]


def write(page: Path) -> None:
    """Write the verdict's tables into the page."""
    text = page.read_text(encoding="utf-8")
    for name, shown in (("planned", table(OF_THE_VERDICT)), ("compared", against_lora())):
        marked = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(marked, rf"\1\n{shown}\n\n\2", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def against_lora() -> str:
    """What decides in each study of `BY_COMPARE`: what LoRA reached, and the others minus LoRA, in Markdown."""
    rows = []
    for title, study in BY_COMPARE.items():
        results = json.loads((STUDIES / study / "results.json").read_text(encoding="utf-8"))
        entries, budget = {one["entry"]: one for one in results["entries"]}, results["budgets"]["all"]
        measure, covers = budget["measure"], 100 - 100 * budget["level"]
        name = title if covers == 95 else f"{title}; intervals of {covers:g} %"
        factor, digits = (1, 3) if measure == "loss" else (100, 1)
        link, lora = f"[{name}](../studies/{study}/README.md)", factor * entries["lora"]["values"][measure][0]
        found = [entries[other]["differences"][measure] for other in ("smoa", "dora", "hira")]
        cells = [signed(factor * own["mean"], factor * own["low"], factor * own["high"], digits) for own in found]
        rows.append([link, f"{lora:.{digits}f}", *cells])
    return Table(["what decides", "LoRA", "SMoA − LoRA", "DoRA − LoRA", "HiRA − LoRA"], rows).markdown()


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    return Table(HEADER, [line(title, STUDIES / study, what) for title, study, what in rows]).markdown()


def line(title: str, study: Path, what: Compared | Forgot) -> list[str]:
    """A row of the table; the title links to the study's report."""
    values = what.values(summary_of(study))
    smoa, lora = (f"{number:.{what.form[1]}f}" for number in (values.smoa, values.lora))
    difference = signed(values.difference, values.low, values.high, what.form[1])
    winner = {"better": "SMoA is better", "worse": "LoRA is better"}.get(values.verdict)
    result = "not significant" if winner is None else winner + (", barely" if values.p > BARELY else "")
    link = f"[{title}](../studies/{study.name}/README.md)"
    return [link, smoa, lora, difference, f"{values.p:.2g}", result]


def signed(difference: float, low: float, high: float, digits: int) -> str:
    """A difference with its interval, as in "+0.023 [−0.011, +0.060]"; what rounds to zero has no sign."""
    texts = [f"{value:+.{digits}f}".replace("-", "−") for value in (difference, low, high)]
    shown = [re.sub(r"^[+−](0\.0+)$", r"\1", text) for text in texts]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
