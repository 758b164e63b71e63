"""What reading found and running had missed: dtypes and gradients of one product, slots of another scale, odd names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smoa import SmoaConfig
from smoa.hotswap import hotswap_adapter
from tests.support import tiny
from tests.support.layers import adapted_layer, factors, smoa_layers
from tests.support.tiny import EXPERTS, build, tokens

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**options: Any) -> SmoaConfig:
    settings: dict[str, Any] = {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": TARGETS}
    return SmoaConfig(task_type="CAUSAL_LM", **(settings | options))


def norms(layer: nn.Module, x: Tensor, *, twice: bool = False, compiled: bool = False) -> list[float]:
    """Of the gradients of A and B."""
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    found = torch.autograd.grad(call(x).float().square().sum(), factors(layer), create_graph=twice)  # type: ignore[arg-type]
    return [float(one.detach().norm()) for one in found]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradients_of_float16_are_the_same_compiled_and_differentiated_twice(kind: str) -> None:
    torch.compiler.reset()
    base = nn.Linear(64, 48) if kind == "linear" else nn.Conv1d(16, 48, 4)
    x = torch.randn(100, 64).half() if kind == "linear" else torch.randn(8, 16, 20).half()
    layer = adapted_layer(base.half().requires_grad_(False), r=8, num_blocks=2, route="one product")
    eager = norms(layer, x)
    assert min(eager) > 0
    assert norms(layer, x, twice=True) == pytest.approx(eager, rel=0.02)
    assert norms(layer, x, compiled=True) == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_float64_is_not_touched_by_autocast(kind: str) -> None:
    base = nn.Linear(64, 48) if kind == "linear" else nn.Conv1d(16, 48, 4)
    x = torch.randn(100, 64).double() if kind == "linear" else torch.randn(8, 16, 20).double()
    layer = adapted_layer(base.double(), r=8, num_blocks=2, route="one product")
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


def test_a_compiled_product_under_autocast_rounds_no_factor() -> None:
    torch.compiler.reset()
    layer = adapted_layer(nn.Linear(64, 48).requires_grad_(False), r=8, num_blocks=2, route="one product")
    x = torch.randn(100, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert norms(layer, x, compiled=True) == pytest.approx(norms(layer, x), rel=1e-3)


@torch.no_grad()
def test_an_infinite_entry_off_the_blocks_survives_a_merge() -> None:
    layer = adapted_layer(nn.Linear(12, 12), r=4, num_blocks=2, partition="contiguous")
    base: Any = layer.get_base_layer()
    base.weight[0, 11] = float("inf")
    before = base.weight.clone()
    layer.merge()
    assert base.weight[0, 11] == float("inf")
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_a_slot_that_took_an_adapter_of_another_scale_is_saved_and_loaded_again(tmp_path: Path) -> None:
    ids = tiny.batch("llama")["input_ids"]
    for scale in ("lora", "block"):
        get_peft_model(tiny.build("llama"), config(scale=scale)).save_pretrained(tmp_path / scale)
    model = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "lora").eval()
    hotswap_adapter(model, tmp_path / "block")
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_are_compiled_by_themselves_are_adapted_after_a_call_without_adapters(implementation: str) -> None:
    torch.compiler.reset()
    base: Any = build("qwen3_moe")
    base.set_experts_implementation(implementation)
    model = get_peft_model(base, config(target_modules=[], target_parameters=EXPERTS)).eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        experts: list[Any] = [each for name, each in base.named_modules() if type(each).__name__ == "Qwen3MoeExperts"]
        for each in experts:
            each.compile(backend="eager")
        with model.disable_adapter():
            assert not torch.allclose(model(tokens()).logits, expected, atol=1e-3)
        torch.testing.assert_close(model(tokens()).logits, expected)
    model(tokens()).logits.square().mean().backward()
    assert all(part.grad is not None for layer in smoa_layers(model).values() for part in factors(layer))


def test_pefts_helper_that_stops_casts_of_inputs_takes_the_model() -> None:
    model = get_peft_model(tiny.build("llama"), config())
    with disable_input_dtype_casting(model):
        model(**tiny.batch("llama"))


@pytest.mark.parametrize("route", ["one product", "blocks"])
def test_a_frozen_adapter_costs_no_product_for_gradients_of_its_factors(route: Any) -> None:
    layer = adapted_layer(nn.Linear(64, 48).requires_grad_(False), r=8, num_blocks=2, route=route)
    x, costs, gradients = torch.randn(100, 64, requires_grad=True), list[int](), list[Tensor]()
    for trains in (True, False):
        layer.smoa_A.requires_grad_(trains), layer.smoa_B.requires_grad_(trains)  # type: ignore[operator,union-attr]
        y = layer(x).square().sum()
        with FlopCounterMode(display=False) as counter:
            gradients += torch.autograd.grad(y, x)
        costs.append(counter.get_total_flops())
    assert torch.equal(*gradients)
    assert costs[1] < costs[0]


@pytest.mark.parametrize("route", ["one product", "blocks"])
@pytest.mark.parametrize("partition", ["spectral", "contiguous"])
def test_a_frozen_adapter_keeps_no_input_for_the_backward(route: Any, partition: Any) -> None:
    base = nn.Linear(64, 48, dtype=torch.float64).requires_grad_(False)
    layer = adapted_layer(base, r=8, num_blocks=2, route=route, partition=partition)
    x = torch.randn(100, 64, dtype=torch.float64, requires_grad=True)
    kept, gradients, saved = list[int](), list[Tensor](), list[Tensor]()
    for trains in (True, False):
        layer.smoa_A.requires_grad_(trains), layer.smoa_B.requires_grad_(trains)  # type: ignore[operator,union-attr]
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
            y = layer(x)
        kept.append(max(each.untyped_storage().nbytes() for each in saved if each.shape == x.shape))
        first = torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0]
        gradients += [first, *torch.autograd.grad(first.square().sum(), x)]
    assert kept == [x.nbytes, x.itemsize]
    torch.testing.assert_close(gradients[2:], gradients[:2])


def test_a_bias_that_trains_alone_is_differentiated_twice() -> None:
    base = nn.Linear(64, 48, dtype=torch.float64).requires_grad_(False)
    layer = adapted_layer(base, r=8, num_blocks=2, route="one product").requires_grad_(False)
    bias = layer.base_layer.bias.requires_grad_(True)
    y = layer(torch.randn(100, 64, dtype=torch.float64))
    (first,) = torch.autograd.grad(y.square().sum(), bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), bias)
    torch.testing.assert_close(second, torch.full_like(second, 200.0))
