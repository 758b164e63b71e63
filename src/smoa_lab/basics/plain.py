"""Plain values for files that leave this machine: finite numbers, no places of it, no secrets."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, cast

from huggingface_hub import constants


def _mapped(value: Any, change: Callable[[Any], Any], hides: Callable[[str], bool] = lambda key: False) -> Any:
    """``value`` with each plain value within dictionaries and lists changed, and without texts whose key ``hides``
    them."""
    if isinstance(value, dict):
        kept = ((key, inside) for key, inside in value.items() if not (isinstance(inside, str) and hides(str(key))))
        return {key: _mapped(inside, change, hides) for key, inside in kept}
    if isinstance(value, list | tuple):
        return [_mapped(inside, change, hides) for inside in value]
    return change(value)


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, also within dictionaries and lists: what a run left that diverged."""
    return _mapped(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def json_text(value: Any) -> str:
    """``value`` as indented JSON, None for what is not finite."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False)


def portable(value: Any) -> Any:
    """``value`` with only the last name of every absolute path, also within dictionaries and lists."""

    def last_name(leaf: Any) -> Any:
        is_place = isinstance(leaf, str) and (leaf.startswith("~/") or PurePosixPath(leaf).is_absolute())
        is_place = is_place or (isinstance(leaf, str) and PureWindowsPath(leaf).is_absolute())
        return PureWindowsPath(leaf).name if is_place else leaf

    return _mapped(value, last_name)


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
    """Plain values without texts that are named like secrets, and with ``***`` in the place of each known token: those
    in the environment, and the one that ``hf auth login`` has stored."""
    tokens = [text.strip() for key, text in os.environ.items() if names_secret(key)]
    with suppress(OSError, UnicodeDecodeError):
        tokens.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    known = sorted((token for token in tokens if len(token) >= SHORTEST and "/" not in token), key=len, reverse=True)

    def cleaned(leaf: Any) -> Any:
        for token in known if isinstance(leaf, str) else ():
            leaf = leaf.replace(token, "***")
        return leaf

    return cast(Value, _mapped(value, cleaned, names_secret))
