"""Writes the parts of pages that are made from stored results and from the code: python docs/generate.py

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of a page is written by hand. In the same
way benchmarks/report.py writes the tables of benchmarks, and docs/figures/layer_kinds.py that of kinds of layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "studies"))

from tables import BLOCKS  # noqa: E402

PAGES = ("results.md", "verdict.md", "migration.md")


def written(text: str) -> str:
    """The page with each part of BLOCKS that it has made anew."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{block()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in (DOCS / name for name in PAGES):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
