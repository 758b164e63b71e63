"""Writes the 400 conversations that were compared: python studies/chats/rows.py FILE (pip install chitchat-dataset).

They are the first question and answer of the conversations that `examples/chitchat_conversations.py` writes, if both
have fewer than 200 characters together and the answer more than 40: what a CPU can train on.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROWS, LONGEST, SHORTEST_ANSWER = 400, 200, 40


def main(file: Path) -> None:
    every = file.with_suffix(".every.jsonl")
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "chitchat_conversations.py"))["main"](every)
    talks = [json.loads(line)["messages"][:2] for line in every.read_text("utf-8").splitlines()]
    every.unlink()
    sizes = [[len(message["content"]) for message in talk] for talk in talks]
    chosen = [t for t, (q, a) in zip(talks, sizes, strict=True) if q + a < LONGEST and a > SHORTEST_ANSWER][:ROWS]
    file.write_text("".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in chosen), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
