from __future__ import annotations

import pytest
from pydantic import ValidationError

from smoa_lab.basics.section import Section


class Block(Section):
    """A block of one key."""

    key: int = 0


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Block(kye=1)


def test_values_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Block(key=1).key = 2
