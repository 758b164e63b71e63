"""What reading found and running had missed: dtypes and gradients of one product, slots of another scale, odd names."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.flop_counter import FlopCounterMode

from smoa import AdapterFileError, MergeError, SmoaConfig, UnsupportedModuleError, merged
from smoa.hotswap import hotswap_adapter
from smoa.route import route_of
from smoa.kernels import one_product
from tests.support import tiny_models
from tests.support.layers import adapted_layer, factors, smoa_layers, take_route
from tests.support.tiny_mixtures import EXPERTS, build_mixture, tokens

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


def test_a_compiled_step_on_a_gpu_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = adapted_layer(nn.Linear(64, 48).requires_grad_(False), r=8, num_blocks=2)
    take_route("one product")
    monkeypatch.setattr("smoa.route.may_form", lambda device: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert route_of(layer, torch.randn(100, 64), "default", alone=True) != "one product"
    assert not one_product.ONE_PRODUCT_ON_GPU


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


@pytest.mark.parametrize("by", ["hotswap", "load"])
def test_a_slot_that_took_an_adapter_of_another_scale_is_saved_and_loaded_again(by: str, tmp_path: Path) -> None:
    ids = tiny_models.batch("llama")["input_ids"]
    for scale in ("lora", "block"):
        get_peft_model(tiny_models.build("llama"), config(scale=scale)).save_pretrained(tmp_path / scale)
    model = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "lora").eval()
    if by == "hotswap":
        hotswap_adapter(model, tmp_path / "block")
    else:
        model.load_adapter(tmp_path / "block", "default")
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_are_compiled_by_themselves_are_adapted_after_a_call_without_adapters(implementation: str) -> None:
    torch.compiler.reset()
    base: Any = build_mixture("qwen3_moe")
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


def test_tensors_that_transformers_is_given_are_checked_as_a_file_is() -> None:
    saved = get_peft_model_state_dict(get_peft_model(tiny_models.build("llama"), config()))
    another = tiny_models.build("llama")
    for parameter in another.parameters():
        parameter.data *= 2
    with pytest.raises(AdapterFileError, match="adapter_state_dict/tensors: the adapter was trained on another base"):
        another.load_adapter(peft_config=config(), adapter_state_dict=dict(saved))
    labels = {name: tensor for name, tensor in saved.items() if "labels" not in name}
    with pytest.raises(AdapterFileError, match=r"adapter_state_dict/tensors: the adapter file lacks \d+ tensor"):
        tiny_models.build("llama").load_adapter(peft_config=config(), adapter_state_dict=labels)
    model = tiny_models.build("llama")
    model.load_adapter(peft_config=config(), adapter_state_dict=dict(saved))
    assert len(smoa_layers(model)) == len(saved) // 5


def test_what_a_pattern_of_blocks_does_not_match_is_told() -> None:
    with pytest.warns(UserWarning, match="num_blocks_pattern: q_prj matches no target"):
        get_peft_model(tiny_models.build("llama"), config(num_blocks_pattern={"q_prj": 4, "v_proj": 4}))


def test_loras_names_set_what_they_mean_after_the_config_is_made_too() -> None:
    own: Any = config()
    own.lora_alpha, own.lora_dropout = 64, 0.5
    assert (own.alpha, own.smoa_dropout) == (64, 0.5)


def test_pefts_helper_that_stops_casts_of_inputs_takes_the_model() -> None:
    model = get_peft_model(tiny_models.build("llama"), config())
    with disable_input_dtype_casting(model):
        model(**tiny_models.batch("llama"))


def test_a_copy_that_another_adapter_trains_is_no_target() -> None:
    model = get_peft_model(tiny_models.build("llama"), config(modules_to_save=["lm_head", "mlp"]), "one")
    with pytest.raises(UnsupportedModuleError, match=r"original_module\.up_proj.*an adapter has it in modules_to_save"):
        model.add_adapter("two", config(target_modules=["up_proj"]))
    model.add_adapter("three", config(target_modules="all-linear"))
    names = smoa_layers(model).keys()
    assert not [name for name in names if "lm_head" in name or "mlp" in name]


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


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("compute", "undo"),
    [
        (lambda base: parametrize.register_parametrization(base, "weight", nn.Identity()), remove_parametrizations),
        (nn.utils.weight_norm, lambda base, _: nn.utils.remove_weight_norm(base)),
        (nn.utils.spectral_norm, lambda base, _: nn.utils.remove_spectral_norm(base)),
        (lambda base: prune.l1_unstructured(base, "weight", 0.3), prune.remove),
    ],
)
def test_a_merge_into_a_weight_that_is_computed_since_injection_is_refused(compute: Any, undo: Any) -> None:
    model = get_peft_model(tiny_models.build("llama"), config())
    name, layer = next(iter(smoa_layers(model).items()))
    base: Any = layer.get_base_layer()
    compute(base)
    with pytest.raises(MergeError, match=f"{name}: its weight is computed from others"):
        model.merge_adapter()
    assert not any(each.merged for each in smoa_layers(model).values())
    with pytest.raises(MergeError, match="remove_parametrizations of"):
        layer.merge()
    undo(base, "weight")
    model.merge_adapter()
    kept: Any = layer.pristine
    compute(base)
    for undone in (model.unmerge_adapter, partial(model.set_adapter, "default")):
        with pytest.raises(MergeError, match=f"{name}: its weight, into which adapters are merged, is computed"):
            undone()
        assert all(each.merged for each in smoa_layers(model).values())
    with pytest.raises(MergeError, match="computed from others"):
        layer.unmerge()
    assert layer.pristine is kept
    undo(base, "weight")
    model.unmerge_adapter()
    assert kept.is_in(base.weight, 0)


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_layer_whose_adapters_take_no_part_may_have_any_weight_in_a_merge() -> None:
    model = get_peft_model(tiny_models.build("llama"), config())
    model.add_adapter("others", config(target_modules=["up_proj"]))
    resting = [layer for name, layer in smoa_layers(model).items() if "up_proj" not in name]
    for layer in resting:
        parametrizations.weight_norm(layer.get_base_layer())
    pruned = next(layer for layer in smoa_layers(model).values() if layer not in resting).get_base_layer()
    pruned.register_parameter("weight_orig", nn.Parameter(torch.ones(1)))  # the weight is a parameter all the same
    model.merge_adapter(["others"])
    model.unmerge_adapter()
    model.set_adapter("others")
    with merged(model):
        assert not any(layer.merged for layer in resting)


def test_a_bias_that_trains_alone_is_differentiated_twice() -> None:
    base = nn.Linear(64, 48, dtype=torch.float64).requires_grad_(False)
    layer = adapted_layer(base, r=8, num_blocks=2, route="one product").requires_grad_(False)
    bias = layer.base_layer.bias.requires_grad_(True)
    y = layer(torch.randn(100, 64, dtype=torch.float64))
    (first,) = torch.autograd.grad(y.square().sum(), bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), bias)
    torch.testing.assert_close(second, torch.full_like(second, 200.0))
