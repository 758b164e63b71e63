"""Merging and unmerging layers and models: layers/merging.py, tuner/model.py and tuner/merged.py."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import MergeError, SmoaConfig, UnsupportedModuleError, merged
from tests import oracle
from tests.support.layers import (
    KINDS,
    adapted_layer,
    add_adapter,
    assert_close,
    base_layer,
    base_weight,
    factors,
    input_of,
    kind_of_layer,
    layers_of,
    oracle_delta,
    randomise,
    stored_bits,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TwoLayers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12, dtype=dtype)
        self.second = nn.Linear(12, 9, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def adapted_model(*adapters: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Adapters on both layers with random factors; the first one is active."""
    names = adapters or ("default",)
    config = SmoaConfig(r=4, num_blocks=3, alpha=2.0, target_modules=["first", "second"])
    model = get_peft_model(TwoLayers(dtype), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for layer in layers_of(model):
        for name in names:
            randomise(layer, name)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_the_merged_weight_is_the_oracles_rounded_once_and_unmerges_bit_for_bit(
    dtype: torch.dtype, conv1d: bool
) -> None:
    layer = adapted_layer(base_layer(11, 13, conv1d=conv1d, dtype=dtype), r=7, num_blocks=3, alpha=2.0)
    before = stored_bits(layer.get_base_layer())
    delta = oracle_delta(layer)
    exact = oracle.effective_weight(base_weight(layer).double(), [delta])
    layer.merge()
    # half a unit in the last place, and what rounding ΔW's factors and their product may add to it
    limit = 0.51 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 4 * torch.finfo(dtype).eps
    more = (4 if dtype.itemsize == 2 else 1) * limit * delta.abs() + (0 if dtype == torch.float64 else 1e-7)
    assert ((base_weight(layer).double() - exact).abs() <= limit * exact.abs() + more).all()
    for _ in range(20):
        randomise(layer)  # what the factors are by then does not count
        layer.unmerge()
        assert stored_bits(layer.get_base_layer()) == before
        layer.merge()


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_layer_is_refused_under_safe_merge_and_others_are_unmerged_bit_for_bit(value: float) -> None:
    model = adapted_model()
    _, second = layers_of(model)
    with torch.no_grad():
        factors(second)[1][0, 0] = value
    before = stored_bits(model)
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not second.merged
    model.unmerge_adapter()
    assert stored_bits(model) == before


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("r", [6, 120], ids=["spread", "stacked"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_merge_writes_to_the_blocks_alone_whatever_the_factors_hold(
    dtype: torch.dtype, broken: float, r: int, count: int
) -> None:
    base = base_layer(40, 30, dtype=dtype)
    base.weight[::3, ::2] = -0.0
    layer, before = adapted_layer(base, r=r, num_blocks=3), stored_bits(base)
    if count == 2:
        add_adapter(layer, "other", r=r, num_blocks=3)
    factors(layer)[0][-1, 0] = factors(layer)[1][0, 0] = broken
    weight, blocks = base.weight.clone(), layer.blocks("default")
    layer.merge()
    off = blocks.row_labels[:, None] != blocks.col_labels
    assert torch.equal(bits_of(base.weight)[off], bits_of(weight)[off])
    assert not base.weight.isfinite().all()
    layer.unmerge()
    assert stored_bits(base) == before


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def test_a_layer_cast_while_merged_unmerges_to_the_cast_weight() -> None:
    layer = adapted_layer(base_layer(13, 11, dtype=torch.float32), num_blocks=3)
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before.to(torch.bfloat16))


# for a while


def test_a_model_is_merged_for_a_while_and_restored_bit_for_bit() -> None:
    model, x = adapted_model("one", "two"), torch.randn(5, 10, dtype=torch.float64)
    model.base_model.set_adapter(["one", "two"])
    before, expected = stored_bits(model), model(x)
    with contextlib.suppress(ZeroDivisionError), merged(model) as same:
        assert same is model
        assert all(layer.merged for layer in layers_of(model))
        assert_close(model(x), expected)
        raise ZeroDivisionError
    assert stored_bits(model) == before
    assert torch.equal(model(x), expected)


def test_what_is_merged_already_is_refused_and_stays_so() -> None:
    model = adapted_model()

    def refused() -> bool:
        with pytest.raises(MergeError, match="already; call unmerge_adapter first"), merged(model):
            pass
        return all(layer.merged for layer in layers_of(model))

    with merged(model):
        assert refused()
    model.merge_adapter()
    assert refused()


def test_nothing_is_trained_while_a_model_is_merged() -> None:
    model = adapted_model()
    with merged(model), pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.randn(5, 10, dtype=torch.float64)).sum().backward()


def test_offloaded_weights_are_merged_for_a_while_if_asked_for() -> None:
    model, x = adapted_model(), torch.randn(5, 10, dtype=torch.float64)
    expected = model(x)
    cpu_offload(model)
    with pytest.raises(UnsupportedModuleError, match=r"first: .* is offloaded; .*lossy=True"), merged(model):
        pass
    with merged(model, lossy=True):
        assert_close(model(x), expected)
    assert torch.equal(model(x), expected)


def test_what_is_unloaded_meanwhile_stays_merged() -> None:
    model, x = adapted_model(), torch.randn(5, 10, dtype=torch.float64)
    expected = model(x)
    with pytest.warns(UserWarning, match="already merged"), merged(model):
        plain = model.merge_and_unload()
    assert_close(plain(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_base_that_was_made_in_inference_mode_merges_and_unmerges(kind: str) -> None:
    with torch.inference_mode():
        base = kind_of_layer(kind)
    layer, x = adapted_layer(base, r=5, num_blocks=3), input_of(kind)
    before, weight = layer(x), layer.get_base_layer().weight
    bits = weight.clone()
    layer.merge()
    assert_close(layer(x), before)
    assert not torch.equal(weight, bits)
    layer.unmerge()
    assert torch.equal(weight, bits)
