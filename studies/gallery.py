"""Writes the answers of docs/gallery.md, before and after training, from stored results.

    python studies/gallery.py

A table goes between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re

from stored import STUDIES, Run, runs_of

from smoa_lab.pages.tables import Table

PAGE = STUDIES.parent / "docs" / "gallery.md"
LAB_RESULTS = PAGE.parent / "lab-results"
ASKED = [
    ("If you have leftover cake, where would you put it?", "refrigerator"),
    ("Where is one likely to find poker chips?", "bar"),
    ("Where in your home would you keep a ballpoint pen when not in use?", "desk drawer"),
    ("Where might you see a green field while driving?", "countryside"),
    ("What can eating hamburger cause immediately after eating it?", "indigestion"),
]
"""The first questions of the study's test part, with their answers."""
DIGEST = "023048810e087ce3618e2d128228ebcc4e99c01a1c125b195cb84ffb01b74385"
"""Of that test part; its runs have it too."""
WORDS = 24
"""A text is cut after so many words."""
STAGES = ("before", "LoRA", "SMoA")


def dialogue() -> Table:
    """What SmolLM2 said next in held-out conversations: every sample of the two runs."""
    lora, smoa = (
        json.loads((LAB_RESULTS / "rows" / f"chitchat-{method}.json").read_text(encoding="utf-8"))
        for method in ("lora", "smoa")
    )
    lines = []
    for theirs, ours in zip(lora["samples"], smoa["samples"], strict=True):
        said = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", ours["question"], flags=re.DOTALL)[-1]
        texts = (said, ours["reference"], ours["before"], theirs["after"], ours["after"])
        lines.append([cell(text) for text in texts])
    return Table(["said", "a person answered", *STAGES], lines)


def commonsense() -> Table:
    """Which of the first questions of CommonsenseQA were answered right: by the untouched model, and with seed 0 by
    LoRA and SMoA at the rate of their lowest loss."""
    runs = runs_of(STUDIES / "scale-csqa")
    shown = [runs["untouched"], best(runs, "lora"), best(runs, "spectral-lora")]
    assert {run["sha256"] for run in shown} == {DIGEST}  # the questions are those that were asked
    lines = [
        [question, answer, *("right" if run["questions"]["right"][i] else "wrong" for run in shown)]
        for i, (question, answer) in enumerate(ASKED)
    ]
    count, shares = len(shown[0]["questions"]["right"]), [run["scores"]["all"]["accuracy"] for run in shown]
    return Table(
        ["question", "answer", *STAGES],
        [*lines, [f"all {count} questions", "", *(f"{100 * own:.1f} %" for own in shares)]],
    )


def best(runs: dict[str, Run], entry: str) -> Run:
    """The entry's run with seed 0 whose loss is lowest."""
    own = [run for name, run in runs.items() if name.startswith(f"final/{entry}/") and name.endswith("-seed-0")]
    return min(own, key=lambda run: run["scores"]["all"]["gold_loss"] or float("inf"))


def cell(text: str) -> str:
    """A text in one line of a table, cut after WORDS."""
    words = text.replace("|", "\\|").split()
    return " ".join(words[:WORDS]) + (" …" if len(words) > WORDS else "")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in {"dialogue": dialogue(), "commonsense": commonsense()}.items():
        start, end = (text.index(f"<!-- {edge} {name} -->") for edge in ("begin", "end"))
        lines = table.markdown(["---"] * len(table.header))
        text = f"{text[:start]}<!-- begin {name} -->\n\n{lines}\n\n{text[end:]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
