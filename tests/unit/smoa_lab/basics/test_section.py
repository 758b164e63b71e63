from __future__ import annotations

import pytest
from pydantic import ValidationError

from smoa_lab.basics.section import Section, Seed


class Block(Section):
    """A block of one key."""

    key: int = 0
    seed: Seed = 0


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Block(kye=1)


def test_values_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Block(key=1).key = 2


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_that_every_generator_takes(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        Block(seed=seed)
    assert Block(seed=2**32 - 1).seed == 2**32 - 1
