from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import nn

from smoa import SmoaConfig
from smoa_lab.study.changes import LAYERS, _spread, weight_changes
from tests.support import tiny_models


def sizes(weight: torch.Tensor, update: torch.Tensor) -> tuple[float, float, float]:
    """Both relative norms and the stable rank, by numpy."""
    of_weight, of_update = (np.linalg.svd(one.detach().double().numpy(), compute_uv=False) for one in (weight, update))
    norm, spectral_norm = np.linalg.norm(of_update), of_update[0]
    return norm / np.linalg.norm(of_weight), spectral_norm / of_weight[0], (norm / spectral_norm) ** 2


def test_full_fine_tuning_is_measured_against_the_base() -> None:
    base = tiny_models.build("llama")
    model = copy.deepcopy(base)
    linear = {path for path, one in model.named_modules() if isinstance(one, nn.Linear) and one is not model.lm_head}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    found = weight_changes(model, base)
    assert found is not None
    before, after = dict(base.named_modules()), dict(model.named_modules())
    expected = [sizes(before[path].weight, after[path].weight - before[path].weight) for path in linear]
    for place, name in enumerate(("relative_norm", "relative_spectral_norm", "stable_rank")):
        values = [one[place] for one in expected]
        assert found[name] == pytest.approx({"mean": np.mean(values), "max": max(values)}, rel=1e-3)
    assert found["layers"] == len(linear)
    assert found["intruders"]["max"] == 0


CONFIGS = [
    SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False),
    LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"),
    OSFConfig(effective_rank=4, target_modules=["q_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.peft_type.value))
def test_an_adapter_is_measured_by_what_merging_it_changes(config: PeftConfig) -> None:
    """PiSSA and OSF split W when they start, which is no change yet."""
    base = tiny_models.build("llama")
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = weight_changes(model, base)
    merged = model.merge_and_unload()
    pairs = [
        (old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        for old, new in zip(base.model.layers, merged.model.layers, strict=True)
    ]
    expected = [sizes(old, new - old)[0] for old, new in pairs]
    assert found is not None
    assert found["layers"] == 2
    assert found["relative_norm"] == pytest.approx({"mean": np.mean(expected), "max": max(expected)}, rel=1e-3)


def test_a_run_that_diverged_has_no_figures() -> None:
    base = tiny_models.build("llama")
    model = copy.deepcopy(base)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
    assert weight_changes(model, base) is None


@pytest.mark.parametrize("number", [1, LAYERS, LAYERS + 1, 90])
def test_the_layers_are_spread_over_the_model(number: int) -> None:
    layers = [(str(i), None) for i in range(number)]
    chosen = [int(path) for path, _ in _spread(layers)]
    assert len(set(chosen)) == min(number, LAYERS)
    assert (chosen[0], chosen[-1]) == (0, number - 1)
    assert max(np.diff([*chosen]), default=1) - min(np.diff([*chosen]), default=1) <= 1
