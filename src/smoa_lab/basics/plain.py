"""Plain values for files that leave this machine: finite numbers, no places of it, no secrets."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, cast

from huggingface_hub import constants


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, also within dictionaries and lists: what a run left that diverged."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """``value`` as indented JSON, None for what is not finite."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False)


def portable(value: Any) -> Any:
    """``value`` with only the last name of every absolute path, also within dictionaries and lists."""
    if isinstance(value, dict):
        return {key: portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_of_this_machine(value) else value


def _is_of_this_machine(text: str) -> bool:
    return text.startswith("~/") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


Value = TypeVar("Value")

NAMES = re.compile(
    r"(?:.*[_-])?(?:token|password|passwd|secret|credentials?|authorization|api[_-]?key|(?:access|private|secret)[_-]?key)",
    re.IGNORECASE,
)
OF_TOKENIZERS = re.compile(
    r"(?:.*[._])?(?:bos|eos|pad|unk|sep|cls|mask|image|video|audio|stop|boi|eoi|eot|start|prefix|suffix)_token"
)
"""Named alike, and no secrets."""
SHORTEST = 8
"""Characters of a token; shorter values may be words."""


class Unsaved(str):
    """A token that can be used and not be saved: pickled, as the Trainer pickles its arguments, it is empty."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ()

    def __deepcopy__(self, memo: Any) -> Unsaved:
        return self


def names_secret(key: str) -> bool:
    """Whether a value of this name is a secret, such as ``hub_token`` or ``WANDB_API_KEY``."""
    return bool(NAMES.fullmatch(key)) and not OF_TOKENIZERS.fullmatch(key)


def without_secrets(value: Value) -> Value:
    """Plain values without texts that are named like secrets, and with ``***`` in the place of each known token."""
    return cast(Value, _cleaned(value, _known_tokens()))


def _known_tokens() -> list[str]:
    """Those in the environment, and the one that ``hf auth login`` has stored."""
    found = [value.strip() for key, value in os.environ.items() if names_secret(key)]
    with suppress(OSError, UnicodeDecodeError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    return sorted((one for one in found if len(one) >= SHORTEST and "/" not in one), key=len, reverse=True)


def _cleaned(value: Any, tokens: list[str]) -> Any:
    if isinstance(value, dict):
        secret = {key for key, one in value.items() if isinstance(one, str) and names_secret(str(key))}
        return {key: _cleaned(one, tokens) for key, one in value.items() if key not in secret}
    if isinstance(value, list | tuple):
        return [_cleaned(one, tokens) for one in value]
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, "***")
    return value
