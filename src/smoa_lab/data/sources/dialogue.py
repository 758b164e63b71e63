"""The chitchat task: the next message of a two-speaker conversation (PyPI package ``chitchat-dataset``, MIT)."""

from __future__ import annotations

from typing import Any

from smoa_lab.basics.extras import import_package
from smoa_lab.data.records import Record, in_test_part

MIN_TURNS = 4
TURNS_SHOWN = 4
# Whole conversations are held out: of twenty, one goes to the test part.
TEST_SHARE = 20


def read_chitchat(split: str) -> list[Record]:
    """One record per conversation: its last turn is the answer, the turns before it are shown.

    Conversations of one sender, or of fewer than four turns, are left out.
    """
    package = import_package("chitchat_dataset", "chitchat")
    conversations: dict[str, Any] = dict(package.Dataset())
    chosen = {key: talk for key, talk in conversations.items() if in_test_part(key, TEST_SHARE) == (split == "test")}
    return [record for key, talk in chosen.items() if (record := _record(key, talk)) is not None]


def _record(key: str, talk: dict[str, Any]) -> Record | None:
    turns = [turn for turn in talk["messages"] if turn]
    speakers = {message["sender"] for turn in turns for message in turn}
    texts = [" ".join(message["text"].strip() for message in turn).strip() for turn in turns]
    if len(turns) < MIN_TURNS or len(speakers) != 2 or not (texts[-1] and texts[-2]):
        return None
    *before, last = texts[-1 - TURNS_SHOWN : -1]
    context = "Continue the conversation.\n" + "\n".join(before)
    return Record("chitchat", key, last, texts[-1], context=context)
