from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from smoa import ConfigError, PartitionError, SmoaConfig, SmoaError, UnsupportedModuleError
from smoa.layers.layer import SmoaLayer
from tests.support.tiny_mixtures import EXPERTS, build_mixture
from tests.support.tiny_models import build, logits
from tests.support.tolerance import assert_close


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return inject_adapter_in_model(SmoaConfig(**{"target_modules": [], **settings}), model)


@pytest.mark.parametrize(
    "named",
    [["model.layers.0.mlp.experts.down_proj"], ["mlp.experts.gate_up_proj", "self_attn.q_proj.weight"], ["down_proj"]],
)
def test_the_parameters_are_those_that_lora_adapts(named: list[str]) -> None:
    found = []
    for config in (SmoaConfig, LoraConfig):
        model = get_peft_model(build_mixture("qwen3_moe"), config(r=4, target_modules=[], target_parameters=named))
        found.append(sorted(model.base_model.targeted_parameter_names))
        wrapped = [name for name, m in model.named_modules() if type(m).__name__ == "ParamWrapper"]
        found[-1] += sorted(wrapped)
    assert found[0] == found[1]


def test_a_weight_named_as_a_parameter_computes_what_its_module_does() -> None:
    by_module = adapted(build("llama"), target_modules=["gate_proj"], init_weights=False)
    by_parameter = adapted(build("llama"), target_parameters=["gate_proj.weight"], init_weights=False)
    for layer, wrapper in zip(_layers(by_module), _layers(by_parameter), strict=True):
        for name in ("smoa_A", "smoa_B"):
            getattr(wrapper, name)["default"].load_state_dict(getattr(layer, name)["default"].state_dict())
    assert not torch.allclose(logits(by_module), logits(build("llama")), atol=1e-3)
    assert_close(logits(by_parameter), logits(by_module))


def _layers(model: nn.Module) -> list[SmoaLayer]:
    return [module for module in model.modules() if isinstance(module, SmoaLayer)]


def test_a_second_adapter_uses_the_wrappers_of_the_first() -> None:
    model = get_peft_model(build_mixture("llama4"), SmoaConfig(target_modules=[], target_parameters=EXPERTS))
    before = _layers(model)
    model.add_adapter("other", SmoaConfig(target_modules=[], target_parameters=EXPERTS))
    assert _layers(model) == before
    assert all(set(layer.smoa_A) == set(layer.smoa_B) == {"default", "other"} for layer in before)


# PEFT looks at modules only, from 0.21 on
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
def test_patterns_go_by_the_parameters_name() -> None:
    patterns = {"experts.down_proj": 8}
    model = adapted(build_mixture("qwen3_moe"), r=4, target_parameters=EXPERTS, rank_pattern=patterns)
    ranks = {m.parameter_name: m.r["default"] for m in model.modules() if type(m).__name__ == "ParamWrapper"}
    assert ranks == {"gate_up_proj": 4, "down_proj": 8}


class Odd(nn.Module):
    """Parameters that can't be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.kernel = nn.Parameter(torch.ones(2, 3, 4, 5))
        self.packed = nn.Parameter(torch.ones(2, 8, 8, dtype=torch.uint8), requires_grad=False)
        self.eight = nn.Parameter(torch.ones(2, 8, 8).to(torch.float8_e4m3fn), requires_grad=False)
        self.plain = nn.Linear(8, 8)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


BAD: dict[str, tuple[dict[str, Any], type[SmoaError], str]] = {
    "no such parameter": (
        {"target_parameters": ["inner.nrom"]},
        ConfigError,
        r"target_parameters: 'inner.nrom' matches no parameter.*did you mean 'inner\.",
    ),
    "one dimension": (
        {"target_parameters": ["inner.norm"]},
        ConfigError,
        r"target_parameters: inner.norm has shape \(8,\), and only those of 2 or 3 dimensions .*leave it out",
    ),
    "four dimensions": (
        {"target_parameters": ["kernel"]},
        ConfigError,
        r"inner.kernel has shape \(2, 3, 4, 5\), and only those of 2 or 3",
    ),
    "quantized": (
        {"target_parameters": ["packed"]},
        UnsupportedModuleError,
        r"inner.packed has shape \(2, 8, 8\) and is quantized to torch.uint8.*dequantize=True",
    ),
    "in 8-bit floats": (
        {"target_parameters": ["eight"]},
        UnsupportedModuleError,
        r"inner.eight has shape \(2, 8, 8\) and is quantized to torch.float8_e4m3fn",
    ),
    "its module too": (
        {"target_parameters": ["plain.weight"], "target_modules": ["plain"]},
        ConfigError,
        r"inner.plain.weight: target_modules names its module too; name it in one of the two",
    ),
    "K by a pattern": (
        {"target_parameters": ["plain.weight"], "num_blocks_pattern": {"plain.weight": 9}, "r": 9},
        PartitionError,
        r"inner.plain.weight: num_blocks=9 must be between 1 and 8.*\(8, 8\)",
    ),
    "several": (
        {"target_parameters": ["inner.norm", "kernel"]},
        ConfigError,
        r"inner.norm has shape \(8,\).*; .*inner.kernel has shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_parameter_that_can_not_be_adapted_is_refused_before_anything_changes(case: str) -> None:
    settings, error, message = BAD[case]
    model = nn.ModuleDict({"inner": Odd()})
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        adapted(model, **settings)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_router_is_refused(family: str) -> None:
    name = "mlp.router.weight" if family == "gpt_oss" else "mlp.gate.weight"
    with pytest.raises(ConfigError, match=rf"{name} has shape \(5, 24\) and chooses the experts.*leave the router out"):
        adapted(build_mixture(family), target_parameters=[*EXPERTS, name])


def test_a_parametrized_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight' matches no parameter.*remove the parametrization first"):
        adapted(nn.ModuleDict({"inner": Odd()}), target_parameters=["inner.parametrized.weight"])


def test_all_linear_says_once_that_it_leaves_the_experts_out_and_how_to_name_them() -> None:
    with pytest.warns(UserWarning, match="linear layers only") as caught:
        model = get_peft_model(build_mixture("mixtral"), SmoaConfig(target_modules="all-linear"))
    told = [str(warning.message) for warning in caught if "linear layers only" in str(warning.message)]
    assert len(told) == 1
    assert "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", SmoaConfig(target_modules="all-linear"))


def test_all_linear_says_nothing_if_there_are_none_or_they_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(build("llama"), target_modules="all-linear")
        adapted(build_mixture("mixtral"), target_modules="all-linear", target_parameters=EXPERTS)


def test_a_parameter_of_the_model_itself_is_refused_with_pefts_words() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Targeting an nn.Parameter on the top-level module is not supported"):
        adapted(model, target_parameters=["weight"])
