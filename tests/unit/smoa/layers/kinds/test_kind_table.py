from __future__ import annotations

import pytest
from torch import nn

from smoa.layers.kinds.kind_table import KINDS, kind_of
from tests.support.kinds import KINDS as EXAMPLES
from tests.support.kinds import kind_of_layer


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_layer_is_of_the_first_kind_whose_class_it_has(example: str) -> None:
    base = kind_of_layer(example)
    kind = kind_of(base)
    assert kind is not None
    assert isinstance(base, kind.base_class)
    assert kind.name.endswith(kind.base_class.__name__)


def test_every_kind_has_an_example() -> None:
    assert {kind_of(kind_of_layer(example)) for example in EXAMPLES} == set(KINDS)


def test_other_layers_are_of_no_kind() -> None:
    assert kind_of(nn.ConvTranspose2d(2, 2, 2)) is None
