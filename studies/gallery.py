"""Writes the answers of docs/gallery.md, before and after training, from stored results.

    python studies/gallery.py

A table goes between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re
from typing import Any

import stored

from smoa.errors import DataError
from smoa_lab.config.run import DataSection
from smoa_lab.pages.tables import Table
from smoa_lab.study.trials import TrialStore

PAGE = stored.STUDIES.parent / "docs" / "gallery.md"
COUNT = 5
"""The first so many questions are shown."""
WORDS = 24
"""A text is cut after so many words."""
STAGES = ("before", "LoRA", "SMoA")


def dialogue() -> Table:
    """What SmolLM2 said next in held-out conversations: every sample of the two runs."""
    lora, smoa = (
        json.loads((PAGE.parent / "lab-results" / "rows" / f"chitchat-{method}.json").read_text(encoding="utf-8"))
        for method in ("lora", "smoa")
    )
    lines = []
    for theirs, ours in zip(lora["samples"], smoa["samples"], strict=True):
        said = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", ours["question"], flags=re.DOTALL)[-1]
        texts = (said, ours["reference"], ours["before"], theirs["after"], ours["after"])
        lines.append([cell(text) for text in texts])
    return Table(["said", "a person answered", *STAGES], lines)


def marked(study: str, entries: tuple[str, str]) -> Table:
    """Which of the first questions of a study's test part were answered right: by the untouched model, and with seed 0
    by LoRA and SMoA at the rate of their lowest loss."""
    store = TrialStore(stored.STUDIES / study)
    runs = [store.find("untouched") or {}, *(best(store, entry) for entry in entries)]
    asked = DataSection.model_validate(runs[0]["config"]["data"]).select()
    if {run["sha256"] for run in runs} != {asked.account["used"]["test"]["sha256"]}:
        raise DataError(f"studies/{study}: its questions are not those that are read now; install its data as then")
    lines = [
        [
            cell(str(row.prompt)),
            cell(str(row.completion)),
            *("right" if run["questions"]["right"][i] else "wrong" for run in runs),
        ]
        for i, row in enumerate(asked.test[:COUNT])
    ]
    shares = [f"{100 * run['scores']['all']['accuracy']:.1f} %" for run in runs]
    return Table(["question", "answer", *STAGES], [*lines, [f"all {len(asked.test)} questions", "", *shares]])


def best(store: TrialStore, entry: str) -> dict[str, Any]:
    """The entry's run with seed 0 whose loss is lowest."""
    found = [store.find(name) or {} for name in store.names(f"final/{entry}/") if name.endswith("-seed-0")]
    return min(found, key=lambda run: run["scores"]["all"]["gold_loss"] or float("inf"))


def cell(text: str) -> str:
    """A text in one line of a table, cut after WORDS."""
    words = text.replace("|", "\\|").split()
    return " ".join(words[:WORDS]) + (" …" if len(words) > WORDS else "")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "dialogue": dialogue(),
        "sums": marked("retention-smollm2", ("lora", "smoa-k8")),
        "commonsense": marked("scale-csqa", ("lora", "spectral-lora")),
    }
    for name, table in tables.items():
        start, end = (text.index(f"<!-- {edge} {name} -->") for edge in ("begin", "end"))
        lines = table.markdown(["---"] * len(table.header))
        text = f"{text[:start]}<!-- begin {name} -->\n\n{lines}\n\n{text[end:]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
