"""Examples as plain values, to keep them as JSON and to tell whether two say the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from smoa_lab.rows.formats import Conversation, Example, Passage, Preference
from smoa_lab.rows.turns import Message

KINDS: dict[str, type[Example]] = {"conversation": Conversation, "passage": Passage, "preference": Preference}


def content_digest(example: Example) -> str:
    """A digest that is equal for rows that say the same, whatever their white space and case."""
    return sha256(json.dumps(_evened(plain_example(example))).encode()).hexdigest()


def _evened(value: Any) -> Any:
    """``value`` without differences of white space and case, also within dictionaries and lists."""
    match value:
        case str():
            return " ".join(value.split()).casefold()
        case dict():
            return {key: _evened(one) for key, one in value.items()}
        case list() | tuple():
            return [_evened(one) for one in value]
    return value


def plain_example(example: Example) -> dict[str, Any]:
    """The example as values that JSON has; the inverse of :func:`example_of`."""
    name = next(name for name, kind in KINDS.items() if isinstance(example, kind))
    return {"kind": name, **asdict(example)}


def example_of(values: dict[str, Any]) -> Example:
    """The example of plain values."""
    kind: Any = KINDS[values["kind"]]
    fields = {key: value for key, value in values.items() if key != "kind"}
    made: Example = kind(**{key: _messages(one) if isinstance(one, list) else one for key, one in fields.items()})
    return made


def read_examples(texts: Iterable[str]) -> list[Example]:
    """The examples of the column ``example``."""
    return [example_of(json.loads(text)) for text in texts]


def _messages(turns: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(**turn) for turn in turns)
