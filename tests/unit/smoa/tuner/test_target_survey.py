from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

from smoa import SmoaConfig, SmoaError
from smoa.tuner.targets import survey_targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(12, 8)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.bank = nn.Module()
        self.bank.bias = nn.Parameter(nn.init.zeros_(nn.Linear(4, 1).weight)[0])


def test_targets_are_counted_and_the_model_is_left_alone() -> None:
    model = Net()
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["good"])
    assert survey_targets(model, config, lambda config, name: name in config.target_modules, loads_labels=False) == 1
    assert type(model.good) is nn.Linear


def test_problems_of_modules_and_of_parameters_are_one_error_before_anything_is_changed() -> None:
    model = Net()
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["good", "bilinear"], target_parameters=["bank.bias"])
    with pytest.raises(SmoaError, match=r"(?s)bilinear.*; .*bank\.bias"):
        get_peft_model(model, config)
    assert type(model.good) is nn.Linear
