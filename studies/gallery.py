"""Writes the answers of docs/gallery.md, before and after training, from stored results.

    python studies/gallery.py

The table goes between `<!-- begin dialogue -->` and `<!-- end dialogue -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re

from stored import STUDIES

from smoa_lab.pages.tables import Table

PAGE = STUDIES.parent / "docs" / "gallery.md"
LAB_RESULTS = PAGE.parent / "lab-results"
WORDS = 16
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


def cell(text: str) -> str:
    """A text in one line of a table, cut after WORDS."""
    words = text.replace("|", "\\|").split()
    return " ".join(words[:WORDS]) + (" …" if len(words) > WORDS else "")


def main() -> None:
    text, table = PAGE.read_text(encoding="utf-8"), dialogue()
    start, end = (text.index(f"<!-- {edge} dialogue -->") for edge in ("begin", "end"))
    lines = table.markdown(["---"] * len(table.header))
    PAGE.write_text(f"{text[:start]}<!-- begin dialogue -->\n\n{lines}\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
