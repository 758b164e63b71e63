"""Chit-chat: the next message of a two-speaker conversation (PyPI package ``chitchat-dataset``, MIT)."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from smoa.errors import DataError
from smoa_lab.data.records import Record

MIN_TURNS = 4
TURNS_SHOWN = 4
# Whole conversations are held out: of twenty, one goes to the test part.
TEST_SHARE = 20


def read_chitchat(split: str) -> list[Record]:
    """One record per conversation: its last turn is the answer, the turns before it are shown.

    Conversations of one sender, or of fewer than four turns, are left out.
    """
    try:
        package = importlib.import_module("chitchat_dataset")
    except ImportError as error:
        raise DataError("chitchat: needs chitchat-dataset: pip install chitchat-dataset") from error
    conversations: dict[str, Any] = dict(package.Dataset())
    chosen = {key: talk for key, talk in conversations.items() if _is_test(key) == (split == "test")}
    return [record for key, talk in chosen.items() if (record := _record(key, talk)) is not None]


def _is_test(key: str) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % TEST_SHARE == 0


def _record(key: str, talk: dict[str, Any]) -> Record | None:
    turns = [turn for turn in talk["messages"] if turn]
    speakers = {message["sender"] for turn in turns for message in turn}
    texts = [" ".join(message["text"].strip() for message in turn).strip() for turn in turns]
    if len(turns) < MIN_TURNS or len(speakers) != 2 or not (texts[-1] and texts[-2]):
        return None
    *before, last = texts[-1 - TURNS_SHOWN : -1]
    context = "Continue the conversation.\n" + "\n".join(before)
    return Record("chitchat", key, last, texts[-1], context=context)
