"""The one type of a row: a prompt, what should follow it, and where there are any, the other answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Literal
from unicodedata import normalize

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
KEPT = ("own", "where")
"""What is no part of a row, and kept beside it."""


@dataclass(frozen=True)
class Message:
    """A turn: who says it (``system``, ``user`` or ``assistant``), and what."""

    role: str
    content: str


Said = str | tuple[Message, ...]
"""Plain text, or turns of a conversation."""


@dataclass(frozen=True)
class Row:
    """A prompt, never trained, and its completion: both are text, or both turns of a conversation.

    A text without a prompt is trained in full. A conversation without one is trained where the assistant speaks. A row
    with ``choices`` is a conversation whose completion is the turn ``choices[label]``. ``part`` is where the row says
    that it belongs. A held-out row that was read keeps ``own``, all its fields as JSON, ``where`` it is, and the
    ``group`` of rows that it belongs to.
    """

    prompt: Said
    completion: Said
    choices: tuple[str, ...] = ()
    label: int | None = None
    part: Part | None = None
    own: str = field(default="", compare=False)
    where: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    @property
    def is_text(self) -> bool:
        return isinstance(self.completion, str)

    @property
    def digest(self) -> str:
        """Equal for rows that say the same, whatever their format, white space, case and way of writing accents: what
        is said in turn, and the choices, in any order."""
        said = [*_texts(self.prompt), *_texts(self.completion)]
        return _hash([said, [], sorted(map(_even, self.choices))])  # the empty list is of what stored runs were made by

    @property
    def key(self) -> int:
        """A number that is equal where prompt and completion are, whatever the other answers: by it rows are split, and
        known again."""
        return int(_hash([*_texts(self.prompt), *_texts(self.completion)])[:16], 16)

    @property
    def asked(self) -> int:
        """A number that is equal where the prompt is, or what is said before the first answer; a text without a prompt
        has its own."""
        turns = () if isinstance(self.completion, str) else self.completion
        before = takewhile(lambda turn: turn.role != "assistant", turns)
        said = _texts(self.prompt) or _texts(tuple(before))
        return int(_hash(said)[:16], 16) if said else self.key

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if key not in (*KEPT, "group")})


def row_from_json(text: str, **kept: str) -> Row:
    """The row of a JSON text, and of what is ``kept`` beside it."""
    values = json.loads(text) | kept
    for key in ("prompt", "completion"):
        if isinstance(values[key], list):
            values[key] = tuple(Message(**turn) for turn in values[key])
    return Row(**{**values, "choices": tuple(values["choices"])})


def _hash(form: object) -> str:
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()


def _texts(said: Said) -> list[str]:
    """What is said, without differences of white space, case and composed or decomposed letters."""
    texts = [said] if isinstance(said, str) else [message.content for message in said]
    return [even for text in texts if (even := _even(text))]


def _even(text: str) -> str:
    return " ".join(normalize("NFC", text).split()).casefold()
