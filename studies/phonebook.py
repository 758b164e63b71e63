"""How many random numbers does an adapter hold? A phone book, after arXiv:2603.01097 and arXiv:2605.30260.

    python studies/run.py phonebook-128 phonebook-512 --only r1

`First Last:` leads to ten digits drawn at random: 33.2 bits that nothing but the adapter can hold. There is one study
for each number of entries; phonebook/phonebook.yaml has the rule.
"""

from __future__ import annotations

import json
import math
import random
from functools import cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
from last_layers import LastLayers, of_size, passes_of
from transformers import PreTrainedTokenizerBase

from smoa.atomic import write_whole
from smoa_lab.data.rows import Row, question
from smoa_lab.data.sources import Wheel
from smoa_lab.pages.charts import DASHES, MUTED, color_of, lines, save_picture, values
from smoa_lab.pages.tables import Table
from smoa_lab.study.report import full_names
from smoa_lab.study.trials import TrialStore

MIMESIS = Wheel("mimesis", "22.2.0", "4 MB")
DIGITS = 10
BITS = DIGITS * math.log2(10)
"""Of an entry: 33.2."""
CEILING = (256, 512)
"""The numbers of names with three seeds."""
HUNDRED_KB = 25_000
"""Parameters of an adapter of 100 kB, in float32 as it is saved."""
WHOLE_MODELS = {"2 (Allen-Zhu and Li)": 2.0, "3.6 (Morris et al.)": 3.6}
"""Bits a parameter."""
SHOWN = """![Bits stored a parameter, and numbers recalled, against the number of names, by method.](capacity.png)

"""
PAGE = """# How many random numbers does an adapter hold?

Written by `python studies/run.py` from the stored runs; do not edit. `First Last:` leads to ten digits drawn at random,
33.2 bits, on the last two layers of SmolLM2 135M in bfloat16. [The rule](phonebook.yaml) says how; the folders
`phonebook-N` have each run and paired differences.

*Bits a parameter*: N · 33.2 − the loss of the digits in bits, over the trained parameters. *Recalled*: numbers that
greedy decoding among the ten digits and the end gives whole. *At limit*: runs that took all passes allowed, so
that their adapter could hold more.

{results}

{shown}Numbers that an adapter of 100 kB (25,000 parameters in float32) would hold, from the most that each
recalled whole: {held}.

## The law

Bits known of each number = C · r^α · N^−β + b (arXiv:2605.30260), by least squares over the adapter's rows above, r = 1
and 2; *rms* is of what remains, in bits.

{law}

## The search of a learning rate

Seed 100.

{search}
"""


class PhoneBook(LastLayers):
    """Trains and scores the same entries, with logits of the digits and the end."""

    task, searched = "phone book", "phonebook-256"

    @cached_property
    def vocabulary(self) -> list[int]:
        tokenizer = self.base[1]
        return [*map(tokenizer.convert_tokens_to_ids, "0123456789"), tokenizer.eos_token_id]

    def rows(self, count: int) -> dict[str, list[Row]]:
        return dict.fromkeys(("train", "validation", "test"), phone_book(count, self.base[1]))


def names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All pairs of a first and a last name that are a token each."""
    with MIMESIS.open("mimesis/datasets/en/person.json") as file:
        known = json.load(file)
    first = sorted({name for some in known["names"].values() for name in some})
    last = sorted({f" {name}" for name in known["surnames"]})
    short = [[name for name in part if len(tokenizer.tokenize(name)) == 1] for part in (first, last)]
    return ["".join(both) for both in product(*short)]


def phone_book(count: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """So many different names with numbers drawn at random."""
    known, draw = names(tokenizer), random.Random(0)
    return [
        question("phone book", name, f"{name}:", "".join(draw.choices("0123456789", k=DIGITS)))
        for name in draw.sample(known, len(known))[:count]
    ]


def sizes(count: int) -> list[str]:
    """The changes to the study's file for so many entries."""
    return [*of_size(count), f"seeds={[0, 1, 2] if count in CEILING else [0]}"]


def report(studies: Path) -> None:
    """Write phonebook/README.md, and its picture, from the runs of all numbers of names."""
    runs, folder = measured(studies), studies / "phonebook"
    finals = means([run for run in runs if run["stage"] == "final"])
    search = means([run for run in runs if run["stage"] == "tuning"])
    held = {row["entry"]: max(each["held"] for each in finals if each["entry"] == row["entry"]) for row in finals}
    most = ", ".join(f"{name} {held[name]:,.0f}" for name in sorted(held, key=lambda name: -held[name]))
    if has_picture := len({row["names"] for row in finals}) > 1:
        save_picture(picture(finals), folder / "capacity.png")
    parts = {"results": table(finals), "shown": SHOWN if has_picture else "", "held": most or "not known yet"}
    write_whole(folder / "README.md", PAGE.format(**parts, law=laws(finals), search=table(search)))


def measured(studies: Path) -> list[dict[str, Any]]:
    """Of each run the bits stored a parameter, the numbers recalled and the passes taken; ``held`` is what as many
    parameters as ``HUNDRED_KB`` would recall."""
    runs = []
    for folder in studies.glob("phonebook-*"):
        store = TrialStore(folder)
        budgets = {entry: budget_of(entry) for entry in {name.split("/")[1] for name in store.names("final/")}}
        called = full_names(store, budgets)
        for name in (name for name in store.names() if "/" in name):
            run, (stage, entry, _) = store.find(name) or {}, name.split("/")
            training, scores = run["config"]["training"], run["scores"]["all"]
            names, share, parameters = scores["questions"], scores["accuracy"], run["parameters"]
            loss = math.inf if scores["gold_loss"] is None else scores["gold_loss"] * DIGITS / math.log(2)
            passes = passes_of(run)
            runs.append(
                {
                    "stage": stage,
                    "entry": entry,
                    "name": called.get(entry, entry),
                    "budget": budget_of(entry),
                    "method": run["config"]["method"],
                    "rate": training["learning_rate"],
                    "names": names,
                    "parameters": parameters,
                    "bits": names * (BITS - loss) / parameters,
                    "recalled": 100 * share,
                    "held": names * share / parameters * HUNDRED_KB,
                    "passes": passes,
                    "limit": passes >= training["num_train_epochs"],
                }
            )
    return runs


def budget_of(entry: str) -> int:
    """The r of LoRA with as many parameters."""
    return 2 if entry.endswith("-r2") else 1


def means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each adapter, number of names and rate as one row, the best first."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["names"], run["entry"], run["rate"]), []).append(run)
    rows = [
        {
            **own[0],
            **{key: sum(run[key] for run in own) / len(own) for key in ("bits", "recalled", "held", "passes")},
            "seeds": len(own),
            "limit": sum(run["limit"] for run in own),
        }
        for own in groups.values()
    ]
    return sorted(rows, key=lambda row: (row["names"], -row["bits"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = ["adapter", "parameters", "names", "rate", "seeds", "bits a parameter", "recalled %", "passes", "at limit"]
    cells = [
        [
            *(row["entry"], f"{row['parameters']:,}", f"{row['names']:,}", f"{row['rate']:g}", row["seeds"]),
            *(f"{row['bits']:.3f}", f"{row['recalled']:.1f}", f"{row['passes']:.0f}", row["limit"]),
        ]
        for row in rows
    ]
    return Table(header, cells).markdown() if rows else "No run yet."


def laws(rows: list[dict[str, Any]]) -> str:
    """The fitted law of each adapter that has both budgets at three numbers of names or more, as Markdown."""
    entries, lines = dict.fromkeys(row["entry"].removesuffix("-r2") for row in rows), []
    for entry in entries:
        own = [row for row in rows if row["entry"].removesuffix("-r2") == entry]
        of_budget = [{row["names"] for row in own if row["budget"] == r} for r in (1, 2)]
        if len(set.intersection(*of_budget)) >= 3:
            r, names, parameters, bits = (
                np.array([row[key] for row in own]) for key in ("budget", "names", "parameters", "bits")
            )
            factor, alpha, beta, constant, rms = fitted(r, names, bits * parameters / names)
            lines.append([entry, f"{factor:.3g}", *(f"{value:.2f}" for value in (alpha, beta, constant, rms))])
    return Table(["adapter", "C", "α", "β", "b", "rms"], lines).markdown() if lines else "Not fitted yet."


def fitted(r: Any, names: Any, known: Any) -> tuple[float, ...]:
    """C, α, β, b of C · r^α · N^−β + b = ``known`` (points) by least squares, and the root of the mean square that
    remains; α and β are between -4 and 4, in steps of 0.02. Where C and β are below 0 the law falls from b."""
    steps = np.linspace(-4, 4, 401)
    alpha, beta = (grid.reshape(-1, 1) for grid in np.meshgrid(steps, steps[steps != 0]))
    shape = r**alpha * names**-beta
    offset, wanted = shape - shape.mean(1, keepdims=True), known - known.mean()
    factor = offset @ wanted / (offset**2).sum(1)
    rest = ((wanted - factor[:, None] * offset) ** 2).mean(1)
    best = rest.argmin()
    constant = known.mean() - factor[best] * shape[best].mean()
    return float(factor[best]), float(alpha[best, 0]), float(beta[best, 0]), float(constant), float(rest[best] ** 0.5)


def picture(rows: list[dict[str, Any]]) -> Any:
    """Bits stored and numbers recalled against the number of names, with what is known of whole models."""
    methods = {row["name"]: row["method"] for row in rows}
    looks = {name: (color_of(method), dash) for (name, method), dash in zip(methods.items(), cycle(DASHES))}
    ticks = alt.Axis(values=sorted({row["names"] for row in rows}), format=",", title="names to learn")
    x = alt.X("names:Q", axis=ticks, scale=alt.Scale(type="log", nice=False))
    bits = alt.Y("bits:Q", title="bits stored a parameter", scale=alt.Scale(domain=[0, 4]))
    recalled = alt.Y("recalled:Q", title="numbers recalled (%)", scale=alt.Scale(domain=[0, 100]))
    known = alt.Chart(values([{"bits": bits, "text": text} for text, bits in WHOLE_MODELS.items()])).encode(y="bits:Q")
    marks = known.mark_rule(color=MUTED) + known.mark_text(align="left", dx=4, dy=-6).encode(
        x=alt.value(0), text="text:N"
    )
    panels = []
    for r in sorted({row["budget"] for row in rows}):
        own = [row for row in rows if row["budget"] == r]
        both = alt.hconcat(marks + lines(own, looks, x, bits), lines(own, looks, x, recalled))
        panels.append(both.properties(title=f"Parameters of LoRA r = {r}"))
    return alt.vconcat(*panels)
