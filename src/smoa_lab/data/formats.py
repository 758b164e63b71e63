"""Recognises the format of a row by its columns, checks it, and says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from smoa.errors import DataError
from smoa_lab.data.rows import Message, Row

SHOWN = 40
"""How much of a text a message shows, in characters."""


class BadRow(DataError):  # noqa: N818 - says what is bad
    """What is wrong with a row: ``field`` is the path of the field, such as ``messages[2].content``, or None where it
    is the whole row; ``problem`` says what was found and what is expected."""

    def __init__(self, field: str | None, problem: str):
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.field, self.problem = field, problem


def in_words(value: object) -> str:
    """A value in a few words, however long it is."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**15:
            return "a large number"
        case int() | float():
            return f"the number {value!r}"
        case str():
            return excerpt(value)
        case list() | tuple():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {names(value) or 'no keys'}"
    return f"a value of the type {type(value).__name__}"


def excerpt(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def names(keys: Iterable[object]) -> str:
    """Columns or keys in quotes, the first ten of them."""
    quoted = [excerpt(str(key)) for key in keys]
    return ", ".join(quoted[:10]) + (", …" if len(quoted) > 10 else "")


Turn = tuple[str, Message]
"""The path of a turn in its row, such as ``messages[2]``, and the turn."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}

INSTEAD = "use TRL's SFTTrainer with SmoaConfig for tools and images"
REFUSED_KEYS = {
    "tool_calls": f"tool calls are not trained here, only text; {INSTEAD}",
    "function_call": f"function calls are not trained here, only text; {INSTEAD}",
    "reasoning_content": "would not be trained; put it into content, or leave the key out",
    "thinking": "would not be trained; put it into content, or leave the key out",
}
"""Keys of a turn that change its meaning, and what to do instead. Others are ignored, such as ``name`` or ``id``."""

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

REFUSED_COLUMNS = {
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


def unrecognised(row: dict[str, Any]) -> BadRow:
    """What is wrong with a row that has the columns of no format."""
    known = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
    return BadRow(None, f"found the columns {names(row) or 'of an empty object'}, expected those of a format: {known}")


def shape(row: dict[str, Any], format: Format) -> Row:
    """The row of a format, checked.

    Raises:
        BadRow: a column is missing, or what it holds can't be trained on.
    """
    missing = [column for column in COLUMNS[format] if column not in row]
    if missing and not (format == "messages" and "conversations" in row):
        problem = f"is missing, expected in each row of the format {format}; found {names(row) or 'nothing'}"
        raise BadRow(missing[0], problem)
    for column, remedy in REFUSED_COLUMNS.items() if format != "text" else ():
        if row.get(column):
            raise BadRow(column, f"found {in_words(row[column])}, expected none: {remedy}")
    return SHAPES[format](row)


def _messages(row: dict[str, Any]) -> Row:
    field = "messages" if "messages" in row else "conversations"
    return _conversation(read_turns(row[field], field), field)


def _sharegpt(row: dict[str, Any]) -> Row:
    return _conversation(read_turns(row["conversations"], "conversations", ("from", "value")), "conversations")


def _conversation(turns: Sequence[Turn], field: str) -> Row:
    check_order(turns)
    check_answered(turns, field)
    return Row((), _said(turns))


def _alpaca(row: dict[str, Any]) -> Row:
    question = check_text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        if not isinstance(row["input"], str):
            raise BadRow("input", f"found {in_words(row['input'])}, expected text, or nothing")
        question += f"\n\n{row['input']}" if row["input"].strip() else ""
    return Row((), (Message("user", question), Message("assistant", check_text(row["output"], "output"))))


def _text(row: dict[str, Any]) -> Row:
    return Row("", check_text(row["text"], "text"))


def _prompt(row: dict[str, Any]) -> Row:
    if str(row.get("label")).lower() in ("true", "false"):
        problem = "found true or false, expected no label: completions marked as bad would be trained too"
        raise BadRow("label", f"{problem}; keep the good ones and drop the column, or use TRL's KTOTrainer")
    prompt, completion = row["prompt"], row["completion"]
    if not _are_turns(prompt, completion):
        return Row(check_text(prompt, "prompt"), check_text(completion, "completion"))
    asked, said = read_turns(prompt, "prompt"), read_turns(completion, "completion")
    check_order([*asked, *said])
    check_answered(said, "completion")
    return Row(_said(asked), _said(said))


def _preference(row: dict[str, Any]) -> Row:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if chosen == rejected:
        raise BadRow("rejected", "is the same as chosen, expected a worse answer")
    if not _are_turns(chosen, rejected):
        asked = "" if prompt is None else check_text(prompt, "prompt", "text, as chosen and rejected are")
        return Row(asked, check_text(chosen, "chosen"), check_text(rejected, "rejected"))
    better, worse = read_turns(chosen, "chosen"), read_turns(rejected, "rejected")
    if _are_turns(prompt):
        return _preferred(read_turns(prompt, "prompt"), better, worse)
    shared = _shared(better, worse)
    return _preferred(better[:shared], better[shared:], worse[shared:])


def _preferred(asked: list[Turn], better: list[Turn], worse: list[Turn]) -> Row:
    for field, turns in (("chosen", better), ("rejected", worse)):
        check_order([*asked, *turns])
        check_answered(turns, field)
        path, first = turns[0]
        if first.role != "assistant":
            raise BadRow(
                path, f"is where chosen and rejected differ, a {first.role} turn; expected an assistant turn there"
            )
    return Row(_said(asked), _said(better), _said(worse))


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


SHAPES: dict[Format, Callable[[dict[str, Any]], Row]] = {
    "messages": _messages,
    "prompt": _prompt,
    "preference": _preference,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}


def read_turns(value: object, field: str, keys: Sequence[str] = ("role", "content")) -> list[Turn]:
    """The turns of a list of objects, or of the same as JSON text. ``keys`` hold the role and the content.

    Raises:
        BadRow: it is no such list.
    """
    roles = ROLES if keys[0] == "role" else SHAREGPT_ROLES
    turns = _items(value, field)
    return [(path := f"{field}[{number}]", _message(turn, path, keys, roles)) for number, turn in enumerate(turns)]


def check_order(turns: Sequence[Turn]) -> None:
    """Check that user and assistant alternate, from a user on, and that ``system`` comes only first.

    Raises:
        BadRow: they don't.
    """
    before = None
    for path, message in turns:
        role = message.role
        if role == "system" and before is not None:
            raise BadRow(path, f"system follows {before}; expected system only as the first turn")
        if role == before or (role == "assistant" and before in (None, "system")):
            follows = f"{role} follows {before}" if before else f"{role} comes first"
            raise BadRow(path, f"{follows}; expected user and assistant in alternation, user first")
        before = role


def check_answered(turns: Sequence[Turn], field: str) -> None:
    """Check that there is something to train on.

    Raises:
        BadRow: none of the turns is an assistant's.
    """
    if all(message.role != "assistant" for _, message in turns):
        raise BadRow(field, "has no assistant turn; expected at least one, since only these are trained")


def parsed(text: str) -> object:
    """What a JSON text holds, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_text(value: object, field: str, expected: str = "text") -> str:
    """The text of a field.

    Raises:
        BadRow: it is not text, blank, or not a valid string.
    """
    if not isinstance(value, str):
        raise BadRow(field, f"found {in_words(value)}, expected {expected}")
    if not value or value.isspace():
        raise BadRow(field, f"is blank, expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise BadRow(field, f"holds {half}, half of a character, expected {expected}; delete or complete it") from error
    return value


def _items(value: object, field: str) -> list[object]:
    items = parsed(value) if isinstance(value, str) else value
    if isinstance(items, list) and items:
        return items
    json_text = "; write lists as JSON, with json.dumps" if isinstance(value, str) else ""
    raise BadRow(field, f"found {in_words(value)}, expected a list of at least one message{json_text}")


def _message(turn: object, path: str, keys: Sequence[str], roles: Mapping[str, str]) -> Message:
    role_key, content_key = keys
    if not isinstance(turn, dict):
        raise BadRow(path, f"found {in_words(turn)}, expected an object with {role_key} and {content_key}")
    for key in keys:
        if key not in turn and not turn.get("tool_calls"):
            raise BadRow(f"{path}.{key}", f"is missing, expected text; the message has {names(turn) or 'no keys'}")
    role = _role(turn.get(role_key), f"{path}.{role_key}", roles)
    _check_keys(turn, path)
    return Message(role, _content(turn[content_key], f"{path}.{content_key}"))


def _role(value: object, field: str, roles: Mapping[str, str]) -> str:
    if isinstance(value, str) and value in roles:
        return roles[value]
    expected = f"expected {', '.join(list(roles)[:-1])} or {list(roles)[-1]}"
    if isinstance(value, str) and value in TOOL_ROLES:
        raise BadRow(field, f"found {in_words(value)}, {expected}: only text turns are trained here; {INSTEAD}")
    raise BadRow(field, f"found {in_words(value)}, {expected}")


def _check_keys(turn: dict[str, object], path: str) -> None:
    for key, remedy in REFUSED_KEYS.items():
        if turn.get(key):
            raise BadRow(f"{path}.{key}", f"found {in_words(turn[key])}, expected none: {remedy}")
    if turn.get("weight", 1) not in (1, None):
        problem = f"found {in_words(turn['weight'])}, expected 1 or no weight: every assistant turn is trained in full"
        raise BadRow(f"{path}.weight", f"{problem}; give turns that are only context as a prompt with a completion")


def _content(value: object, field: str) -> str:
    if isinstance(value, list) and value:
        return check_text("".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value)), field)
    return check_text(value, field, "text that is not blank")


def _part(part: object, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind != "text":
        raise BadRow(f"{field}.type", f"found {in_words(kind)}, expected 'text': only text is trained here; {INSTEAD}")
    raise BadRow(field, f'found {in_words(part)}, expected {{"type": "text", "text": …}}')
