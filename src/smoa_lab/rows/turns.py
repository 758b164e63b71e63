"""The turns of a conversation: reads them from a list of objects, and checks their roles and order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smoa_lab.rows.faults import bad, found, names


@dataclass(frozen=True)
class Message:
    """A turn: who says it (``system``, ``user`` or ``assistant``), and what."""

    role: str
    content: str


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
REFUSED = {
    "tool_calls": f"tool calls are not trained here, only text; {INSTEAD}",
    "function_call": f"function calls are not trained here, only text; {INSTEAD}",
    "reasoning_content": "would not be trained; put it into content, or leave the key out",
    "thinking": "would not be trained; put it into content, or leave the key out",
}
"""Keys of a turn that change its meaning, and what to do instead. Others are ignored, such as ``name`` or ``id``."""


def read_turns(value: object, field: str, keys: Sequence[str] = ("role", "content")) -> list[Turn]:
    """The turns of a list of objects, or of the same as JSON text. ``keys`` hold the role and the content.

    Raises:
        BadRow: it is no such list.
    """
    roles = ROLES if keys[0] == "role" else SHAREGPT_ROLES
    turns = _list(value, field)
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
            raise bad(path, f"system follows {before}; expected system only as the first turn")
        if role == before or (role == "assistant" and before in (None, "system")):
            follows = f"{role} follows {before}" if before else f"{role} comes first"
            raise bad(path, f"{follows}; expected user and assistant in alternation, user first")
        before = role


def check_answered(turns: Sequence[Turn], field: str) -> None:
    """Check that there is something to train on.

    Raises:
        BadRow: none of the turns is an assistant's.
    """
    if all(message.role != "assistant" for _, message in turns):
        raise bad(field, "has no assistant turn; expected at least one, since only these are trained")


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
        raise bad(field, f"found {found(value)}, expected {expected}")
    if not value or value.isspace():
        raise bad(field, f"is blank, expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise bad(field, f"holds {half}, half of a character, expected {expected}; delete or complete it") from error
    return value


def _list(value: object, field: str) -> list[object]:
    items = parsed(value) if isinstance(value, str) else value
    if isinstance(items, list) and items:
        return items
    json_text = "; write lists as JSON, with json.dumps" if isinstance(value, str) else ""
    raise bad(field, f"found {found(value)}, expected a list of at least one message{json_text}")


def _message(turn: object, path: str, keys: Sequence[str], roles: Mapping[str, str]) -> Message:
    role_key, content_key = keys
    if not isinstance(turn, dict):
        raise bad(path, f"found {found(turn)}, expected an object with {role_key} and {content_key}")
    for key in keys:
        if key not in turn and not turn.get("tool_calls"):
            raise bad(f"{path}.{key}", f"is missing, expected text; the message has {names(turn) or 'no keys'}")
    role = _role(turn.get(role_key), f"{path}.{role_key}", roles)
    _check_keys(turn, path)
    return Message(role, _content(turn[content_key], f"{path}.{content_key}"))


def _role(value: object, field: str, roles: Mapping[str, str]) -> str:
    if isinstance(value, str) and value in roles:
        return roles[value]
    expected = f"expected {', '.join(list(roles)[:-1])} or {list(roles)[-1]}"
    if isinstance(value, str) and value in TOOL_ROLES:
        raise bad(field, f"found {found(value)}, {expected}: only text turns are trained here; {INSTEAD}")
    raise bad(field, f"found {found(value)}, {expected}")


def _check_keys(turn: dict[str, object], path: str) -> None:
    for key, remedy in REFUSED.items():
        if turn.get(key):
            raise bad(f"{path}.{key}", f"found {found(turn[key])}, expected none: {remedy}")
    if turn.get("weight", 1) not in (1, None):
        problem = f"found {found(turn['weight'])}, expected 1 or no weight: every assistant turn is trained in full"
        raise bad(f"{path}.weight", f"{problem}; give turns that are only context as a prompt with a completion")


def _content(value: object, field: str) -> str:
    if isinstance(value, list) and value:
        return check_text("".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value)), field)
    return check_text(value, field, "text that is not blank")


def _part(part: object, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind != "text":
        raise bad(f"{field}.type", f"found {found(kind)}, expected 'text': only text is trained here; {INSTEAD}")
    raise bad(field, f'found {found(part)}, expected {{"type": "text", "text": …}}')
