from __future__ import annotations

import pytest
import torch
from torch import nn

from smoa_lab.scoring.mode import scoring


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(training: bool) -> None:
    model = nn.Linear(2, 2).train(training)

    def fail() -> None:
        with scoring(model):
            assert not model.training
            assert not model(torch.ones(2)).requires_grad
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training == training
