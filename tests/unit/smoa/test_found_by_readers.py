"""What reading found and running had missed: dtypes and gradients of one product, slots of another scale, odd names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.hotswap import hotswap_adapter
from smoa.layers.route import route_of
from smoa.maths.kernels import one_product
from tests.support import tiny_models
from tests.support.layers import adapted_layer, factors, take_route

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
    monkeypatch.setattr("smoa.layers.route.may_form", lambda device: False)
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
