"""Merging and unmerging layers and models: layers/merging.py, tuner/model.py and tuner/merged.py."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import MergeError, SmoaConfig, UnsupportedModuleError, merged
from smoa.merging import Pristine
from tests import reference
from tests.support.kinds import KINDS, input_of, kind_of_layer
from tests.support.layers import (
    adapted_layer,
    base_layer,
    base_weight,
    factors,
    layers_of,
    oracle_delta,
    randomise,
    stored_bits,
)
from tests.support.tolerance import assert_close

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
    exact = reference.effective_weight(base_weight(layer).double(), [delta])
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


@pytest.mark.parametrize(("route", "value"), [("merge_adapter", float("nan")), ("merge_and_unload", float("inf"))])
def test_a_broken_layer_is_refused_under_safe_merge_and_nothing_is_changed_anywhere(route: str, value: float) -> None:
    model = adapted_model()
    first, second = layers_of(model)
    with torch.no_grad():
        factors(second)[1][0, 0] = value
    before = stored_bits(model)
    with pytest.raises(MergeError, match=r"second.*(NaN|infinite)"):
        getattr(model, route)(safe_merge=True)
    assert stored_bits(model) == before
    assert not first.merged
    assert not second.merged
    assert layers_of(model) == [first, second]


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_a_safe_merge_of_what_is_merged_already_does_not_count_it_twice() -> None:
    base = base_layer(11, 13, dtype=torch.float16)
    base.weight.data.mul_(1000)
    layer = adapted_layer(base, r=7, num_blocks=3)
    largest = float(layer.get_delta_weight("default").detach().abs().max())
    layer.set_scale("default", 40_000 / largest)
    layer.merge(safe_merge=True)
    layer.check_merge()


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


def test_a_merge_that_fails_on_the_way_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    before = stored_bits(model)
    second = layers_of(model)[1]
    write = second._write_matrix

    def fail(matrix: Tensor, number: int) -> None:
        monkeypatch.undo()
        write(matrix, number)
        raise MemoryError

    monkeypatch.setattr(second, "_write_matrix", fail)
    with pytest.raises(MemoryError), merged(model):
        pass
    assert stored_bits(model) == before
    with merged(model):
        assert second.merged


@pytest.mark.parametrize("step", ["unmerge", "merge"])
def test_a_layer_that_can_not_be_restored_stays_merged_until_it_can(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted_model(), torch.randn(5, 10, dtype=torch.float64)
    before, expected = stored_bits(model), model(x)
    first, second = layers_of(model)
    write_to = Pristine.write_to

    def fail(kept: Pristine, weight: Tensor, number: int) -> None:
        if weight.data_ptr() == first.stored_weight().data_ptr():
            raise MemoryError
        write_to(kept, weight, number)

    def write(matrix: Tensor, number: int) -> None:
        type(first)._write_matrix(first, matrix, number)
        if step == "merge":
            raise MemoryError

    monkeypatch.setattr(Pristine, "write_to", fail)
    monkeypatch.setattr(first, "_write_matrix", write)
    with pytest.raises(MemoryError), merged(model):
        pass
    assert first.merged
    assert not second.merged
    monkeypatch.undo()
    first.unmerge()
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


@pytest.mark.parametrize(
    ("call", "dtype"),
    [("merged", torch.bfloat16), ("merge_adapter", torch.float16), ("merge_and_unload", torch.bfloat16)],
)
@torch.no_grad()
def test_one_warning_says_what_rounding_takes(call: str, dtype: torch.dtype) -> None:
    model = adapted_model(dtype=dtype)
    layers = layers_of(model)
    for layer in layers:
        layer.smoa_B["default"].weight.mul_(1e-4)
    before = torch.cat([base_weight(layer).double().flatten() for layer in layers])
    delta = torch.cat([oracle_delta(layer).flatten() for layer in layers])
    opened = merged(model)
    with pytest.warns(UserWarning, match="rounded to 16 bits") as warned:
        opened.__enter__() if call == "merged" else getattr(model, call)()
    after = torch.cat([base_weight(layer).double().flatten() for layer in layers])
    (told,) = (float(str(each.message).split("16 bits: ")[1].split("%")[0]) for each in warned)
    lost = 1 - float((after - before) @ delta / delta.square().sum())
    assert lost > 0.1
    assert told / 100 == pytest.approx(lost, abs=0.01)


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


def test_a_weight_that_can_not_be_written_to_is_not_merged() -> None:
    base = base_layer(6, 8)
    base.weight = nn.Parameter(base.weight[:, :1].detach().expand(6, 8))
    layer, x = adapted_layer(base, r=4, num_blocks=2), torch.randn(3, 8, dtype=torch.float64)
    before = layer(x)
    with pytest.raises(RuntimeError, match="memory location"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer(x), before)
