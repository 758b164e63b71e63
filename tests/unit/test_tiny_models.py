from __future__ import annotations

import torch

from tests.support import tiny_models


def test_a_family_is_built_with_the_same_weights_every_time(family: str) -> None:
    first = tiny_models.build(family).state_dict()
    torch.rand(5)
    second = tiny_models.build(family).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
