"""The headlines task: satire or news? 28,614 lines from the PyPI package ``evals``, for encoders and decoders."""

from __future__ import annotations

import json
from typing import Any

from smoa_lab.data.records import Record, choice_record, in_test_part
from smoa_lab.data.sources.wheels import Wheel

EVALS = Wheel("evals", "3.0.1.post1", "46 MB")
FILE = "evals/registry/data/sarcasm/samples.jsonl"
CHOICES = ("serious", "sarcastic")
# The file has no official parts: of five headlines, one goes to the test part, by a hash of its text.
TEST_SHARE = 5


def read_headlines(split: str) -> list[Record]:
    """The headlines of one part, in the file's order.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    with EVALS.open(FILE) as lines:
        samples = [json.loads(line) for line in lines]
    records = [_record(number, sample) for number, sample in enumerate(samples)]
    return [record for record in records if in_test_part(record.prompt, TEST_SHARE) == (split == "test")]


def _record(number: int, sample: dict[str, Any]) -> Record:
    *_, headline = sample["input"]
    return choice_record("headlines", str(number), headline["content"], CHOICES, int(sample["ideal"]))
