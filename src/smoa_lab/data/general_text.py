"""General English text, on which every run measures what it forgets: a story, or a user's file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from smoa.errors import DataError

STORY, TITLE = "packaged", "Jules and Michel Verne, In the Year 2889"
WORDS = 120
"""The least words of a passage."""
LONGEST = 2 * WORDS
"""Words at which a file's paragraphs are cut."""


def passages(source: str) -> list[str]:
    """Passages of at least 120 words, each of one paragraph or more.

    ``packaged`` is a story of 1889 in the public domain, which lies beside this file; anything else is a text file in
    UTF-8.
    """
    passage, texts = "", list[str]()
    for paragraph in _paragraphs(source):
        passage = f"{passage}\n{' '.join(paragraph.split())}".strip()
        if len(passage.split()) >= WORDS:
            texts.append(passage)
            passage = ""
    if not texts:
        raise DataError(f"forgetting.text: {source}: has no passage of {WORDS} words; give more text")
    return texts


def _paragraphs(source: str) -> Iterable[str]:
    if source == STORY:
        return Path(__file__).with_name("in_the_year_2889.txt").read_text(encoding="utf-8").split("\n\n")
    paragraphs = Path(source).expanduser().read_text(encoding="utf-8").split("\n\n")
    # A file may have no empty lines: of a paragraph of any length only the beginning would be measured.
    words = [paragraph.split() for paragraph in paragraphs]
    return [" ".join(own[start : start + LONGEST]) for own in words for start in range(0, len(own), LONGEST)]
