from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.layers.experts import ParamWrapper
from tests.support.layers import clone_leaf
from tests.support.tiny_mixtures import (
    EXPERTS,
    FAMILIES,
    SETTINGS,
    add_second_adapter,
    build_mixture,
    experts_of,
    matrix_of,
    oracle_deltas,
    wrappers,
)
from tests.support.tolerance import assert_close


def inputs(wrapped: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, the two experts of each token (never the last one) and their weights; sorted for Llama 4."""
    torch.manual_seed(0)
    layout = wrappers(wrapped)["gate_up_proj"].layout
    x = torch.randn(10, layout.in_features, dtype=dtype, requires_grad=True)
    if type(wrapped["experts"].get_base_layer()).__name__.startswith("Llama4"):
        return (x,)
    picked = torch.stack([torch.randperm(layout.experts - 1)[:2] for _ in range(10)])
    return x, picked, torch.rand(10, 2, dtype=dtype)


def with_oracles_weights(wrapped: nn.Module, leaves: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The plain experts with the oracle's W + ΔW in the place of the parameters, differentiable in the factors."""
    plain = copy.deepcopy(wrapped["experts"].get_base_layer())
    for name, wrapper in wrappers(wrapped).items():
        layout, deltas = wrapper.layout, oracle_deltas(wrapper, *leaves[name])
        merged = [
            matrix_of(wrapper, number // layout.halves, number % layout.halves).double() + delta
            for number, delta in enumerate(deltas)
        ]
        experts = torch.stack(merged).unflatten(0, (-1, layout.halves))
        rows = experts.transpose(1, 2).flatten(1, 2) if layout.interleaved else experts.flatten(1, 2)
        delattr(plain, name)
        setattr(plain, name, rows.mT if layout.transposed else rows)
    return plain


@pytest.mark.parametrize("expert_partition", ["each", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_oracles_weights(family: str, expert_partition: str) -> None:
    wrapped = experts_of(family, expert_partition=expert_partition)
    arguments = inputs(wrapped)
    leaves = {
        name: tuple(clone_leaf(f) for f in wrapper.factors("default")) for name, wrapper in wrappers(wrapped).items()
    }
    own = [arguments[0], *(f for wrapper in wrappers(wrapped).values() for f in wrapper.factors("default"))]
    theirs = [arguments[0], *(f for pair in leaves.values() for f in pair)]
    y, expected = wrapped["experts"](*arguments), with_oracles_weights(wrapped, leaves)(*arguments)
    assert_close(y, expected)
    g = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, own, g), torch.autograd.grad(expected, theirs, g), strict=True)
    for found, oracles in pairs:
        assert_close(found, oracles)


def test_an_expert_that_no_token_chooses_gets_no_gradient() -> None:
    wrapped = experts_of("qwen3_moe")
    wrapped["experts"](*inputs(wrapped)).sum().backward()
    A = wrappers(wrapped)["down_proj"].smoa_A["default"].weight
    of_experts = A.grad.unflatten(0, (5, -1)).flatten(1).abs().sum(1)
    assert (of_experts[:4] > 0).all()
    assert of_experts[4] == 0


def test_without_tokens_nothing_is_computed() -> None:
    wrapped = experts_of("qwen3_moe")
    x, picked, weights = inputs(wrapped)
    assert wrapped["experts"](x[:0], picked[:0], weights[:0]).shape == (0, 24)


@pytest.mark.parametrize("modulation", ["none", "noise"])
def test_ablations_change_the_output_by_what_delta_says(modulation: str) -> None:
    wrapped = experts_of("qwen3_moe", modulation=modulation)
    arguments = inputs(wrapped)
    plain = copy.deepcopy(wrapped["experts"].get_base_layer())
    for name, wrapper in wrappers(wrapped).items():
        getattr(plain, name).data += wrapper.get_delta_weight("default")
    assert_close(wrapped["experts"](*arguments), plain(*arguments))


def test_dropout_acts_on_the_adapters_input_only() -> None:
    wrapped = experts_of("qwen3_moe", smoa_dropout=0.99).train()
    arguments = inputs(wrapped)
    plain = wrapped["experts"].get_base_layer()(*arguments)
    torch.manual_seed(0)
    first, second = wrapped["experts"](*arguments), wrapped["experts"](*arguments)
    assert not torch.equal(first, second)
    assert (first - plain).abs().max() > 0
    wrapped.eval()
    assert torch.equal(wrapped["experts"](*arguments), wrapped["experts"](*arguments))


def test_two_active_adapters_add_up() -> None:
    wrapped = experts_of("gpt_oss")
    plain = copy.deepcopy(wrapped["experts"].get_base_layer())
    add_second_adapter(wrapped)
    for name, wrapper in wrappers(wrapped).items():
        wrapper.set_adapter(["default", "second"])
        getattr(plain, name).data += wrapper.get_delta_weight("default") + wrapper.get_delta_weight("second")
    arguments = inputs(wrapped)
    assert len(wrappers(wrapped)) == sum(isinstance(module, ParamWrapper) for module in wrapped.modules())
    assert_close(wrapped["experts"](*arguments), plain(*arguments))


def test_a_linear_layers_weight_is_one_matrix_and_is_adapted_as_by_target_modules() -> None:
    x = torch.randn(2, 3, 13, dtype=torch.float64)
    outputs = []
    for target in ({"target_parameters": ["layer.weight"], "target_modules": []}, {"target_modules": ["layer"]}):
        torch.manual_seed(1)
        base = nn.ModuleDict({"layer": nn.Linear(13, 11, dtype=torch.float64)})
        wrapped = inject_adapter_in_model(SmoaConfig(**SETTINGS, **target), base)
        outputs.append(wrapped["layer"](x))
    assert_close(*outputs)


def test_the_parameter_is_itself_again_after_a_call_and_after_a_failed_one() -> None:
    wrapped = experts_of("qwen3_moe")
    base, arguments = wrapped["experts"].get_base_layer(), inputs(wrapped)
    wrapped["experts"](*arguments)
    with pytest.raises(RuntimeError):
        wrapped["experts"](arguments[0], arguments[1] + 100, arguments[2])
    assert type(base.gate_up_proj) is nn.Parameter
    assert type(base.down_proj) is nn.Parameter


def test_threads_that_share_a_model_get_the_same_output() -> None:
    wrapped = experts_of("qwen3_moe")
    arguments = inputs(wrapped)
    expected = wrapped["experts"](*arguments).detach()
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.extend(wrapped["experts"](*arguments) for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(output, expected) for output in found)


def test_compiled_experts_give_the_same_output() -> None:
    wrapped = experts_of("qwen3_moe")
    arguments = inputs(wrapped)
    compiled = torch.compile(wrapped["experts"], backend="eager")
    assert_close(compiled(*arguments), wrapped["experts"](*arguments))


def test_an_adapter_for_each_sample_is_refused() -> None:
    model = get_peft_model(build_mixture("qwen3_moe"), SmoaConfig(target_modules=[], target_parameters=EXPERTS))
    with pytest.raises(ValueError, match=r"_proj: adapter_names can't be used with adapted experts.*one adapter"):
        model.eval()(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])


def test_its_representation_names_the_parameter() -> None:
    assert repr(experts_of("qwen3_moe")["experts"]).startswith("smoa.ParamWrapper(\n  parameter_name='")


class InputsFirst(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 13, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_a_matrix_that_is_stored_with_its_inputs_first_computes_what_the_merged_one_does(modulation: str) -> None:
    config = SmoaConfig(target_modules=[], target_parameters=["layer.weight"], modulation=modulation, **SETTINGS)
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": InputsFirst()}))
    wrapper, x = wrappers(model)["weight"], torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(clone_leaf(factor) for factor in wrapper.factors("default"))]
    (delta,) = oracle_deltas(wrapper, *leaves[1:])
    expected = x @ (wrapper.stored_weight().detach() + delta)
    assert_close(wrapper(x), expected)
    g = torch.randn_like(expected)
    own = torch.autograd.grad(wrapper(x), [x, *wrapper.factors("default")], g)
    for found, oracles in zip(own, torch.autograd.grad(expected, leaves, g), strict=True):
        assert_close(found, oracles)
    wrapper.merge()
    assert_close(wrapper(x), expected)
