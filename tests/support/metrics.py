"""A metric of a user's own: its file, and what a command lets run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smoa_lab.basics.trust import TRUSTED, Trust

ALIKE = """
def score(answer: str, row: dict) -> float:
    return float(len(answer)) / len(str(row))
"""


@contextmanager
def named(file: Path, source: str = ALIKE, name: str = "score") -> Iterator[str]:
    """A command has named a function of a file with this source."""
    file.write_text(source, encoding="utf-8")
    TRUSTED.metric = f"{file}:{name}"
    try:
        yield f"{file}:{name}"
    finally:
        vars(TRUSTED).update(vars(Trust()))
