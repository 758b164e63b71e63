"""Modules that cannot be adapted are refused by name."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from smoa import PartitionError, SmoaConfig, SmoaError, UnsupportedModuleError
from smoa.linear import Linear
from tests.support.layers import ROUTES, adapted_layer, assert_close, input_of
from tests.support.tiny import EXPERTS, build


def test_the_blocks_of_a_weight_that_zero3_has_left_empty_are_those_of_its_whole_shape() -> None:
    module = Conv1D(2, 10)
    module.weight.ds_shape = module.weight.shape
    module.weight.data = torch.empty(0)
    assert Linear.shape_of(module) == (2, 10)


SUPPORTED = r"torch\.nn\.Linear.*Embedding.*Conv3d.*Conv1D.*quantized"


class OddModel(nn.Module):
    """Modules of many kinds, some of which other PEFT methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("target", "kind"), [("transposed", "ConvTranspose2d"), ("attention", "MultiheadAttention"), ("empty", "Identity")]
)
def test_an_unsupported_module_is_refused_by_name_with_what_there_is(target: str, kind: str) -> None:
    model = OddModel()
    model.empty = nn.Identity()
    with pytest.raises(UnsupportedModuleError, match=rf"{target}: Target module {kind} is not supported.*{SUPPORTED}"):
        get_peft_model(model, SmoaConfig(r=4, target_modules=[target, "linear"]))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    get_peft_model_state_dict(model)  # without a warning
    optimizer = torch.optim.AdamW([factor for factor in model.parameters() if factor.requires_grad], lr=0.1)
    loss().backward()
    optimizer.step()


# All targets at once.


# parameters of experts


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return inject_adapter_in_model(SmoaConfig(**{"target_modules": [], **settings}), model)


@pytest.mark.parametrize(
    "named",
    [["model.layers.0.mlp.experts.down_proj"], ["mlp.experts.gate_up_proj", "self_attn.q_proj.weight"], ["down_proj"]],
)
def test_the_parameters_are_those_that_lora_adapts(named: list[str]) -> None:
    found = []
    for config in (SmoaConfig, LoraConfig):
        model = get_peft_model(build("qwen3_moe"), config(r=4, target_modules=[], target_parameters=named))
        found.append(sorted(model.base_model.targeted_parameter_names))
        wrapped = [name for name, m in model.named_modules() if type(m).__name__ == "ParamWrapper"]
        found[-1] += sorted(wrapped)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("all-linear", True),
        (["q_proj", "gate_proj", "down_proj"], True),
        (r".*\.(q_proj|up_proj)", True),
        (["q_proj", "self_attn.v_proj"], False),
    ],
)
def test_names_that_lora_takes_for_experts_are_told_to_leave_them_out(named: Any, told: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        get_peft_model(build("qwen3_moe"), SmoaConfig(r=4, num_blocks=2, target_modules=named))
    messages = [text for warning in found if "experts" in (text := str(warning.message))]
    expected = "the experts of this mixture are parameters and not adapted by target_modules. To adapt them too, add "
    names = "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']"
    assert messages == ([expected + names] if told else [])


# PEFT looks at modules only, from 0.21 on
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
def test_patterns_go_by_the_parameters_name() -> None:
    patterns = {"experts.down_proj": 8}
    model = adapted(build("qwen3_moe"), r=4, target_parameters=EXPERTS, rank_pattern=patterns)
    ranks = {m.parameter_name: m.adapters["default"].r for m in model.modules() if type(m).__name__ == "ParamWrapper"}
    assert ranks == {"gate_up_proj": 4, "down_proj": 8}


class Odd(nn.Module):
    """Parameters that can't be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.kernel = nn.Parameter(torch.ones(2, 3, 4, 5))
        self.packed = nn.Parameter(torch.ones(2, 8, 8, dtype=torch.uint8), requires_grad=False)

        self.plain = nn.Linear(8, 8)


BAD: dict[str, tuple[dict[str, Any], type[SmoaError], str]] = {
    "one dimension": (
        {"target_parameters": ["inner.norm"]},
        UnsupportedModuleError,
        r"target_parameters: norm has shape \(8,\) .*only matrices",
    ),
    "quantized": (
        {"target_parameters": ["packed"]},
        UnsupportedModuleError,
        r"packed has shape \(2, 8, 8\) and torch.uint8.*that aren't quantized",
    ),
    "K by a pattern": (
        {"target_parameters": ["plain.weight"], "num_blocks_pattern": {"plain.weight": 9}, "r": 9},
        PartitionError,
        r"num_blocks=9 must be between 1 and 8.*\(8, 8\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_parameter_that_can_not_be_adapted_is_refused(case: str) -> None:
    settings, error, message = BAD[case]
    model = nn.ModuleDict({"inner": Odd()})
    with pytest.raises(error, match=message):
        adapted(model, **settings)


def test_all_linear_says_once_that_it_leaves_the_experts_out_and_how_to_name_them() -> None:
    with pytest.warns(UserWarning, match="the experts of this mixture") as caught:
        model = get_peft_model(build("mixtral"), SmoaConfig(target_modules="all-linear"))
    told = [str(warning.message) for warning in caught if "the experts of this mixture" in str(warning.message)]
    assert len(told) == 1
    assert "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", SmoaConfig(target_modules="all-linear"))


# kinds of layers


class Standardized(nn.Conv2d):
    """Computes with another weight than the one that it holds."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Inherited(Doubled):
    pass


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Shifted(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (Inherited(6, 8), torch.randn(5, 6)),
        (Standardized(4, 4, 3), torch.randn(1, 4, 5, 5)),
        (Halved(4, 4, 3), torch.randn(1, 4, 5, 5)),
        (Shifted(16, 8), torch.tensor([[3, 5, 0]])),
        (T5Gemma2TextScaledWordEmbedding(16, 8, 0, embed_scale=2.0, eoi_token_index=5), torch.tensor([[3, 5, 0]])),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_layer_whose_class_computes_something_else_goes_on_doing_so(base: nn.Module, x: Tensor, route: str) -> None:
    expected = base(x)
    layer = adapted_layer(copy.deepcopy(base), trained=False, route=route)
    assert torch.equal(layer(x), expected)


def hooked() -> nn.Module:
    """As accelerate's offloading leaves a layer: with a forward of this one layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    add_hook_to_module(layer, ModelHook())
    assert "forward" in vars(layer)
    return layer


def sharded() -> nn.Module:
    """Of the class that FSDP2 makes for a layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return layer


def patched() -> nn.Module:
    """As Unsloth changes layers: one at a time, by a function that computes the same."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("make", [hooked, sharded, patched, lambda: FalconLinear(13, 11, dtype=torch.float64)])
def test_a_layer_that_computes_the_same_in_another_way_is_adapted(make: Callable[[], nn.Module]) -> None:
    layer = adapted_layer(make(), r=6, num_blocks=3)
    x = input_of("linear")
    unmerged = layer(x)
    assert (unmerged - layer.get_base_layer()(x)).abs().max() > 1e-3
    layer.merge()
    assert_close(layer(x), unmerged)
