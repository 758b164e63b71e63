"""Recognises the format of a row by its columns, checks it, and gives it in one of three shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smoa_lab.rows.faults import Fault, bad, found, names
from smoa_lab.rows.turns import (
    INSTEAD,
    Message,
    Turn,
    check_answered,
    check_order,
    check_text,
    parsed,
    read_turns,
)


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the first ``prompt_turns`` are context and never trained."""

    messages: tuple[Message, ...]
    prompt_turns: int = 0


@dataclass(frozen=True)
class Passage:
    """Plain text, trained in full, after a ``prompt`` that is not."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Preference:
    """A better and a worse continuation of one prompt: all three are turns, or all three plain text."""

    prompt: tuple[Message, ...] | str
    chosen: tuple[Message, ...] | str
    rejected: tuple[Message, ...] | str


Example = Conversation | Passage | Preference
Format = Literal["messages", "prompt", "text", "alpaca", "sharegpt", "preference"]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
"""The columns by which a format is known; of several that fit, the first."""

REFUSED = {
    "tools": f"tools are not trained here; {INSTEAD}",
    "image": f"images are not trained here; {INSTEAD}",
    "images": f"images are not trained here; {INSTEAD}",
    "system": "make it the first turn of a list of messages, with the role system",
    "history": "put the earlier turns into a list of messages",
}
"""Columns that change what a row means, and what to do instead. Others are ignored, such as an id or a source."""


def recognise(row: dict[str, Any]) -> Format | None:
    """The format of a row, or None if it has the columns of none.

    ``conversations`` whose turns have ``role`` are the format ``messages``.
    """
    format = next((format for format, columns in COLUMNS.items() if all(column in row for column in columns)), None)
    return "messages" if format == "sharegpt" and _has_roles(row["conversations"]) else format


def unrecognised(row: dict[str, Any]) -> Fault:
    """What is wrong with a row that has the columns of no format."""
    known = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
    return Fault(None, f"found the columns {names(row) or 'of an empty object'}, expected those of a format: {known}")


def shape(row: dict[str, Any], format: Format) -> Example:
    """The row of a format, checked.

    Raises:
        BadRow: a column is missing, or what it holds can't be trained on; ``fault`` has the field and what is expected.
    """
    missing = [column for column in COLUMNS[format] if column not in row]
    if missing and not (format == "messages" and "conversations" in row):
        problem = f"is missing, expected in each row of the format {format}; found {names(row) or 'nothing'}"
        raise bad(missing[0], problem)
    for column, remedy in REFUSED.items() if format != "text" else ():
        if row.get(column):
            raise bad(column, f"found {found(row[column])}, expected none: {remedy}")
    return SHAPES[format](row)


def _messages(row: dict[str, Any]) -> Conversation:
    field = "messages" if "messages" in row else "conversations"
    return _conversation(read_turns(row[field], field), field)


def _sharegpt(row: dict[str, Any]) -> Conversation:
    return _conversation(read_turns(row["conversations"], "conversations", ("from", "value")), "conversations")


def _conversation(turns: Sequence[Turn], field: str) -> Conversation:
    check_order(turns)
    check_answered(turns, field)
    return Conversation(_said(turns))


def _alpaca(row: dict[str, Any]) -> Conversation:
    question = check_text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        if not isinstance(row["input"], str):
            raise bad("input", f"found {found(row['input'])}, expected text, or nothing")
        question += f"\n\n{row['input']}" if row["input"].strip() else ""
    return Conversation((Message("user", question), Message("assistant", check_text(row["output"], "output"))))


def _text(row: dict[str, Any]) -> Passage:
    return Passage(check_text(row["text"], "text"))


def _prompt(row: dict[str, Any]) -> Conversation | Passage:
    if str(row.get("label")).lower() in ("true", "false"):
        problem = "found true or false, expected no label: completions marked as bad would be trained too"
        raise bad("label", f"{problem}; keep the good ones and drop the column, or use TRL's KTOTrainer")
    prompt, completion = row["prompt"], row["completion"]
    if not _are_turns(prompt, completion):
        return Passage(check_text(completion, "completion"), check_text(prompt, "prompt"))
    asked, said = read_turns(prompt, "prompt"), read_turns(completion, "completion")
    check_order([*asked, *said])
    check_answered(said, "completion")
    return Conversation(_said([*asked, *said]), len(asked))


def _preference(row: dict[str, Any]) -> Preference:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if chosen == rejected:
        raise bad("rejected", "is the same as chosen, expected a worse answer")
    if not _are_turns(chosen, rejected):
        asked = "" if prompt is None else check_text(prompt, "prompt", "text, as chosen and rejected are")
        return Preference(asked, check_text(chosen, "chosen"), check_text(rejected, "rejected"))
    better, worse = read_turns(chosen, "chosen"), read_turns(rejected, "rejected")
    if _are_turns(prompt):
        return _preferred(read_turns(prompt, "prompt"), better, worse)
    shared = _shared(better, worse)
    return _preferred(better[:shared], better[shared:], worse[shared:])


def _preferred(asked: list[Turn], better: list[Turn], worse: list[Turn]) -> Preference:
    for field, turns in (("chosen", better), ("rejected", worse)):
        check_order([*asked, *turns])
        check_answered(turns, field)
        path, first = turns[0]
        if first.role != "assistant":
            raise bad(
                path, f"is where chosen and rejected differ, a {first.role} turn; expected an assistant turn there"
            )
    return Preference(_said(asked), _said(better), _said(worse))


def _shared(better: list[Turn], worse: list[Turn]) -> int:
    """How many leading turns two conversations share."""
    same = [one == other for (_, one), (_, other) in zip(better, worse, strict=False)]
    return [*same, False].index(False)


def _said(turns: Sequence[Turn]) -> tuple[Message, ...]:
    return tuple(message for _, message in turns)


def _are_turns(*values: object) -> bool:
    """Whether they are meant as lists of messages, and not as plain text."""
    return any(isinstance(value, list) for value in values) or all(map(_has_roles, values))


def _has_roles(value: object) -> bool:
    """Whether it is a list of messages, also as JSON text, where text could mean something else."""
    turns = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


SHAPES: dict[Format, Callable[[dict[str, Any]], Example]] = {
    "messages": _messages,
    "prompt": _prompt,
    "preference": _preference,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}
