"""General English text, on which every run measures what it forgets: a story, articles of the Hub, or a user's file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from smoa.errors import DataError

STORY = "packaged"
FINEWIKI = "finewiki"
WORDS = 120
"""The least words of a passage."""
LONGEST = 2 * WORDS
"""Words at which a file's paragraphs are cut."""
ARTICLES = 100
"""How many articles of the Hub's data set are read: those that PEFT's own comparison takes."""


def describe(source: str) -> str:
    """What is read, in a few words."""
    if source == STORY:
        return "Jules and Michel Verne, In the Year 2889"
    return "HuggingFaceFW/finewiki" if source == FINEWIKI else Path(source).name


def passages(source: str) -> list[str]:
    """Passages of at least 120 words.

    ``packaged`` is a story of 1889 in the public domain, which lies beside this file;
    ``finewiki`` are the first 100 articles of HuggingFaceFW/finewiki; anything else is a text file in UTF-8.
    """
    texts = list(_joined(_paragraphs(source)))
    if not texts:
        raise DataError(f"forgetting.text: {source}: has no passage of {WORDS} words; give more text")
    return texts


def _paragraphs(source: str) -> Iterable[str]:
    if source == STORY:
        return Path(__file__).with_name("in_the_year_2889.txt").read_text(encoding="utf-8").split("\n\n")
    if source == FINEWIKI:
        import datasets

        try:
            stream = datasets.load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True)
            return [row["text"][:2000] for row in islice(stream, ARTICLES)]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"forgetting.text: finewiki: cannot be read from the Hub: {error}; use packaged") from error
    try:
        paragraphs = Path(source).expanduser().read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"forgetting.text: {source}: cannot be read: {error}; give packaged, finewiki, or a text file in UTF-8"
        ) from error
    # A file may have no empty lines: of a paragraph of any length only the beginning would be measured.
    words = [paragraph.split() for paragraph in paragraphs]
    return [" ".join(own[start : start + LONGEST]) for own in words for start in range(0, len(own), LONGEST)]


def _joined(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs on one line each, joined until they have enough words."""
    passage = ""
    for paragraph in paragraphs:
        passage = f"{passage}\n{' '.join(paragraph.split())}".strip()
        if len(passage.split()) >= WORDS:
            yield passage
            passage = ""
