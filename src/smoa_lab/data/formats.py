"""Recognizes the format of a row by its columns, checks it, and says what is wrong with it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from smoa.errors import DataError
from smoa_lab.data.row import PARTS, Message, Part, Row

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring = 1, 40


def shown(value: object) -> str:
    """A value in a few words, however long it is."""
    return SHORT.repr(value)


class BadRow(DataError):  # noqa: N818 - says what is bad
    """What is wrong with a row: ``field`` is the path of the field, such as ``messages[2].content``, or None where it
    is the whole row; ``problem`` says what was found and what is expected."""

    def __init__(self, field: str | None, problem: str):
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.field, self.problem = field, problem


Turn = tuple[str, Message]
"""The path of a turn in its row, such as ``messages[2]``, and the turn."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}

INSTEAD = "use TRL's SFTTrainer with SmoaConfig for tools and images"
PREFERENCES = "use TRL's DPOTrainer with SmoaConfig for preferences (examples/trl_trainers.py)"
REFUSED_KEYS = {
    "tool_calls": f"tool calls are not trained here, only text; {INSTEAD}",
    "function_call": f"function calls are not trained here, only text; {INSTEAD}",
    "reasoning_content": "would not be trained; put it into content, or leave the key out",
    "thinking": "would not be trained; put it into content, or leave the key out",
}
"""Keys of a turn that change its meaning, and what to do instead. Others are ignored, such as ``name`` or ``id``."""

Format = Literal["messages", "choices", "prompt", "text", "alpaca", "sharegpt"]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "choices": ("prompt", "choices", "label"),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
"""The columns by which a format is known; of several that fit, the first."""

REFUSED_COLUMNS = {
    "tools": f"tools are not trained here; {INSTEAD}",
    "image": f"images are not trained here; {INSTEAD}",
    "images": f"images are not trained here; {INSTEAD}",
    "system": "make it the first turn of a list of messages, with the role system",
    "history": "put the earlier turns into a list of messages",
}
"""Columns that change what a row means, and what to do instead. Others are ignored, such as an id or a source."""


LIKE_PARTS = {*PARTS, "training", "valid", "val", "dev", "eval", "testing", "heldout", "held-out"}
"""What a column ``part`` that means the part of a row may hold by mistake."""


def recognize(row: dict[str, Any]) -> Format:
    """The format of a row; raises BadRow if it has the columns of none. ``conversations`` whose turns have ``role`` are
    the format ``messages``."""
    if "chosen" in row and "rejected" in row:
        raise BadRow(None, f"found a preference, expected an answer to train on: {PREFERENCES}")
    for format, columns in COLUMNS.items():
        if all(column in row for column in columns):
            return "messages" if format == "sharegpt" and _has_roles(row["conversations"]) else format
    known = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
    raise BadRow(None, f"found the columns {shown(list(row))}, expected those of a format: {known}")


def shape(row: dict[str, Any], format: Format) -> Row:
    """The row of a format; raises BadRow if a column is missing, or what it holds can't be trained on. Its column
    ``part``, if it has one of that meaning, says where it belongs."""
    part: Part | None = row["part"] if row.get("part") in PARTS else None
    if part is None and str(row.get("part")).lower() in LIKE_PARTS:
        raise BadRow("part", f"found {shown(row['part'])}, expected one of {', '.join(PARTS)}")
    return replace(_shaped(row, format), part=part)


def _shaped(row: dict[str, Any], format: Format) -> Row:
    missing = [column for column in COLUMNS[format] if column not in row]
    if missing and not (format == "messages" and "conversations" in row):
        problem = f"is missing, expected in each row of the format {format}; found {shown(list(row))}"
        raise BadRow(missing[0], problem)
    for column, remedy in REFUSED_COLUMNS.items() if format != "text" else ():
        if row.get(column):
            raise BadRow(column, f"found {shown(row[column])}, expected none: {remedy}")
    match format:
        case "text":
            return Row("", check_text(row["text"], "text"))
        case "alpaca":
            return _alpaca(row)
        case "prompt":
            return _prompt(row)
        case "choices":
            return _choices(row)
        case "messages" | "sharegpt":
            field = "messages" if "messages" in row else "conversations"
            keys = ("from", "value") if format == "sharegpt" else ("role", "content")
            return Row((), _answered([], read_turns(row[field], field, keys), field))


def _alpaca(row: dict[str, Any]) -> Row:
    question, more = check_text(row["instruction"], "instruction"), row.get("input")
    more = "" if more is None else more
    if not isinstance(more, str):
        raise BadRow("input", f"found {shown(more)}, expected text, or nothing")
    question += f"\n\n{more}" if more.strip() else ""
    return Row((), (Message("user", question), Message("assistant", check_text(row["output"], "output"))))


def _prompt(row: dict[str, Any]) -> Row:
    if str(row.get("label")).lower() in ("true", "false"):
        problem = "found true or false, expected no label: completions marked as bad would be trained too"
        raise BadRow("label", f"{problem}; keep the good ones and drop the column, or use TRL's KTOTrainer")
    prompt, completion = row["prompt"], row["completion"]
    if not _are_turns(prompt, completion):
        return Row(check_text(prompt, "prompt"), check_text(completion, "completion"))
    asked = read_turns(prompt, "prompt")
    return Row(_said(asked), _answered(asked, read_turns(completion, "completion"), "completion"))


def _choices(row: dict[str, Any]) -> Row:
    prompt, choices = row["prompt"], row["choices"]
    choices = _parsed(choices) if isinstance(choices, str) else choices  # CSV has no lists
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRow("choices", f"found {shown(row['choices'])}, expected a list of two texts or more, in CSV as JSON")
    texts = [_choice(choice, f"choices[{number}]") for number, choice in enumerate(choices)]
    if _are_turns(prompt):
        asked = read_turns(prompt, "prompt")
        if asked[-1][1].role != "user":
            raise BadRow(asked[-1][0], f"found a turn of the {asked[-1][1].role}, expected one of the user to answer")
    else:
        asked = [("prompt", Message("user", check_text(prompt, "prompt").strip()))]
    if len({*texts}) < 2:
        raise BadRow("choices", f"found {shown(row['choices'])}, expected two texts or more that differ")
    label = _label(row["label"], texts)
    answer = [("choices", Message("assistant", texts[label]))]
    return Row(_said(asked), _answered(asked, answer, "choices"), choices=tuple(texts), label=label)


def _choice(value: object, field: str) -> str:
    """The text of a choice: what is no text as JSON."""
    if isinstance(value, bool | int | float | list | dict) and value == value:  # and not NaN, which stands for none
        value = json.dumps(value)
    return check_text(value, field).strip()


def _label(value: object, choices: list[str]) -> int:
    """The number of the right choice: an integer from 0, or the text of that choice; what a CSV has of either."""
    if isinstance(value, str) and value.strip() in choices:
        return choices.index(value.strip())
    is_whole = isinstance(value, float) and value.is_integer()  # as in a Parquet column in which one is missing
    if is_whole or (isinstance(value, str) and value.strip().isdecimal()):
        value = int(value)  # type: ignore[call-overload]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise BadRow("label", f"found {shown(value)}, expected the number of a choice, from 0, or its text")
    return value


def _said(turns: Sequence[Turn]) -> tuple[Message, ...]:
    return tuple(message for _, message in turns)


def _are_turns(*values: object) -> bool:
    """Whether they are meant as lists of messages, and not as plain text."""
    return any(isinstance(value, list) for value in values) or all(map(_has_roles, values))


def _has_roles(value: object) -> bool:
    """Whether it is a list of messages, also as JSON text, where text could mean something else."""
    turns = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_turns(value: object, field: str, keys: Sequence[str] = ("role", "content")) -> list[Turn]:
    """The turns of a list of objects, or of the same as JSON text; raises BadRow if it is none. ``keys`` hold the role
    and the content."""
    turns = _parsed(value) if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        json_text = "; write lists as JSON, with json.dumps" if isinstance(value, str) else ""
        raise BadRow(field, f"found {shown(value)}, expected a list of at least one message{json_text}")
    return [(f"{field}[{number}]", _message(turn, f"{field}[{number}]", *keys)) for number, turn in enumerate(turns)]


def _answered(before: Sequence[Turn], turns: Sequence[Turn], field: str) -> tuple[Message, ...]:
    """The messages of ``turns``, which go on after those ``before``: user and assistant alternate, from a user on,
    ``system`` comes only first, and there is an answer to train on."""
    last = None
    for path, message in (*before, *turns):
        role = message.role
        if role == "system" and last is not None:
            raise BadRow(path, f"system follows {last}; expected system only as the first turn")
        if role == last or (role == "assistant" and last in (None, "system")):
            follows = f"{role} follows {last}" if last else f"{role} comes first"
            raise BadRow(path, f"{follows}; expected user and assistant in alternation, user first")
        last = role
    if all(message.role != "assistant" for _, message in turns):
        raise BadRow(field, "has no assistant turn; expected at least one, since only these are trained")
    return _said(turns)


def check_text(value: object, field: str) -> str:
    """The text of a field; raises BadRow if it is not text, or blank."""
    if not isinstance(value, str):
        raise BadRow(field, f"found {shown(value)}, expected text")
    if not value or value.isspace():
        raise BadRow(field, "is blank, expected text")
    return value


def _message(turn: object, path: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(path, f"found {shown(turn)}, expected an object with {role_key} and {content_key}")
    for key, remedy in REFUSED_KEYS.items():
        if turn.get(key):
            raise BadRow(f"{path}.{key}", f"found {shown(turn[key])}, expected none: {remedy}")
    for key in (role_key, content_key):
        if key not in turn:
            raise BadRow(f"{path}.{key}", f"is missing, expected text; the message has {shown(list(turn))}")
    roles, role, content = ROLES if role_key == "role" else SHAREGPT_ROLES, turn[role_key], turn[content_key]
    if not isinstance(role, str) or role not in roles:
        expected = f"expected one of {', '.join(roles)}: only text turns are trained here; {INSTEAD}"
        raise BadRow(f"{path}.{role_key}", f"found {shown(role)}, {expected}")
    return Message(roles[role], _content(content, f"{path}.{content_key}"))


def _content(value: object, field: str) -> str:
    """The text of a turn, or of its parts."""
    if not isinstance(value, list) or not value:
        return check_text(value, field)
    for number, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            expected = f'{{"type": "text", "text": …}}: only text is trained here; {INSTEAD}'
            raise BadRow(f"{field}[{number}]", f"found {shown(part)}, expected {expected}")
    return check_text("".join(part["text"] for part in value), field)
