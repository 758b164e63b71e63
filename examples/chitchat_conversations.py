"""Writes real conversations as rows of `messages`, to fine-tune a chat model on by `smoa train configs/chitchat.yaml`.

Shows: how to bring conversations into the form that `smoa train`, `smoa data check` and TRL read. They come from the
package chitchat-dataset (MIT), 7,168 conversations of university students. Taken are those of two people with at least
four turns; the one who begins is the user.

Printed when last run:

3234 conversations, 40.7 turns each, in chitchat.jsonl
{'role': 'user', 'content': 'Hello How are you doing today?'}
{'role': 'assistant', 'content': 'whats up MD im doing good how are you doing?'}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chitchat_dataset

MIN_TURNS = 4


def turns_of(talk: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of two people as messages, up to the last answer; none if there are too few."""
    turns = [turn for turn in talk["messages"] if turn]
    senders = {message["sender"] for turn in turns for message in turn}
    texts = [" ".join(message["text"].strip() for message in turn).strip() for turn in turns]
    if len(senders) != 2 or len(texts) < MIN_TURNS or not all(texts):
        return []
    pairs = texts[: len(texts) - len(texts) % 2]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(pairs)]


def main(file: Path) -> None:
    """Write the rows, and show the first."""
    talks = [messages for talk in dict(chitchat_dataset.Dataset()).values() if (messages := turns_of(talk))]
    file.write_text("".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks), "utf-8")
    mean = sum(map(len, talks)) / len(talks)
    print(f"{len(talks)} conversations, {mean:.1f} turns each, in {file}")
    for message in talks[0][:2]:
        print(message)
    assert all(json.loads(line)["messages"][-1]["role"] == "assistant" for line in file.read_text("utf-8").splitlines())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "chitchat.jsonl"))
