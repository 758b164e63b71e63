"""Quantized layers: the oracle on the dequantized weight, nothing dense kept, merged as PEFT does, undone bit for bit.

bitsandbytes is always there; torchao and HQQ are tested where they are installed.
"""

import copy
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from smoa import SmoaConfig, UnsupportedModuleError, keep_in_generate, quantized
from smoa.generation import keeping
from smoa.layer import SmoaLayer
from smoa.quantized import QuantizedLinear
from tests import oracle
from tests.support.layers import (
    QUANTIZED,
    Wrapper,
    adapted_quantized,
    assert_close,
    clone_leaf,
    delta_of,
    factors,
    in_4_bits,
    labels,
    oracle_delta,
    quantized_layer,
    relative_error,
    same_layout_on_every_cpu,
    stored_bits,
    weight_of,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("pieces")


@pytest.fixture(autouse=True)
def _one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests compare on every CPU alike."""
    same_layout_on_every_cpu(monkeypatch)


# inject, compute, train


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_and_gradients_are_the_oracles_on_the_dequantized_weight(kind: str, modulation: str) -> None:
    base = quantized_layer(kind)
    layer = adapted_quantized(base, modulation=modulation).train()
    assert isinstance(layer, QuantizedLinear)
    assert labels(layer) == oracle.spectral_labels(weight_of(layer), 3)
    x, gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 24)
    y = layer(x)
    own = torch.autograd.grad(y, [x, *factors(layer)], gradient)
    leaves = [clone_leaf(t.double()) for t in (x, *factors(layer))]
    weight = weight_of(layer)
    delta = oracle_delta(layer, weight=weight, A=leaves[1], B=leaves[2])
    expected = oracle.forward(leaves[0], weight, base.bias.double(), [delta])
    assert_close(y, expected, torch.float32)
    for mine, theirs in zip(own, torch.autograd.grad(expected, leaves, gradient.double()), strict=True):
        assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_the_output_has_the_inputs_dtype_and_a_small_update_survives(
    dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    layer = adapted_quantized(in_4_bits(compute_dtype)).train()
    with torch.no_grad():
        factors(layer)[1].mul_(2e-3)  # entries of ΔW are thousandths of those of W
    layer.smoa_A.float()
    layer.smoa_B.float()  # as get_peft_model has it
    x = torch.randn(50, 64).to(dtype).requires_grad_()
    assert layer(x).dtype == dtype
    contribution = layer.branch_output(x, "default")
    assert relative_error(contribution, x.detach().double() @ delta_of(layer).T) <= (
        1e-5 if dtype == torch.float32 else 1e-2
    )
    contribution.sum().backward()
    assert x.grad.dtype == dtype
    assert all(factor.grad.dtype == torch.float32 for factor in factors(layer))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_generate_keeps_the_blocks_of_the_update_if_it_is_told_to(kind: str) -> None:
    layer = adapted_quantized(quantized_layer(kind)).eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        with keeping(layer) as snapshot:
            expected = layer(x)
            assert not snapshot.kept
        keep_in_generate(layer, "blocks")
        with keeping(layer) as snapshot:
            assert_close(layer(x), expected)
            kept = sum(part.nbytes for _, deltas in snapshot.kept.values() for _, part in deltas) // 4
            assert kept == sum(len(r) * len(c) for r, c in zip(*parts_of(layer), strict=True))


def parts_of(layer: SmoaLayer) -> tuple[list[Tensor], list[Tensor]]:
    partition = layer.blocks("default")
    return [partition.rows(k) for k in range(3)], [partition.cols(k) for k in range(3)]


# merge and unmerge


def requantization_step(kind: str, weight: Tensor) -> Tensor:
    """An upper bound of what quantizing `weight` once more changes: half the widest gap of the code, of each block."""
    peak = weight.abs().reshape(len(weight), -1, 64).amax(-1, keepdim=True).expand(-1, -1, 64).reshape(weight.shape)
    return {"int8": 0.5 / 127, "torchao": 0.5 / 127, "hqq": 0.25}.get(kind, 0.2) * peak + 1e-3


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_merged_layer_is_the_requantized_sum_and_unmerging_puts_back_every_byte(kind: str) -> None:
    base = quantized_layer(kind)
    layer = adapted_quantized(base)
    before, x, names = stored_bits(base), torch.randn(5, 64), layer.state_dict().keys()
    expected, exact = layer(x), weight_of(layer) + delta_of(layer)
    for _ in range(2):
        layer.merge()
        assert ((layer.base_weight().double() - exact).abs() <= requantization_step(kind, exact)).all()
        assert torch.equal(layer(x), layer.get_base_layer()(x))
        assert layer.get_base_layer().bias is base.bias
        assert layer.state_dict().keys() == names
        assert base not in list(layer.modules())
        assert layer.get_base_layer() is not base
        assert stored_bits(base) == before  # set aside untouched
        layer.unmerge()
    assert layer.get_base_layer() is base
    assert stored_bits(base) == before
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_unloading_gives_the_quantized_layer_back_and_merging_one_of_its_class(kind: str) -> None:
    base = quantized_layer(kind)
    config = SmoaConfig(r=4, target_modules=["layer"], init_weights=False)
    assert get_peft_model(wrapped(base), config).unload().layer is base
    assert type(get_peft_model(wrapped(base), config).merge_and_unload().layer) is type(base)


class Rounded(nn.Module):
    """As HQQ's layer: its weight has another name, it can't be copied, and PEFT's backend replaces it by a new one."""

    in_features, out_features = 64, 24

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.W_q, self.bias = nn.Parameter(weight.mul(64).round().char(), requires_grad=False), None

    def dequantize(self) -> Tensor:
        return self.W_q / 64

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T

    def __deepcopy__(self, memo: Any) -> None:
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol at the moment")


def test_a_layer_without_a_weight_of_that_name_is_unloaded_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        backend_name="of a test",
        supports_merge=True,
        get_base_weight=Rounded.dequantize,
        set_base_weight=lambda layer, weight: setattr(layer, "base_layer", Rounded(weight)),
    )
    monkeypatch.setattr(quantized, "find_quantization_backend", lambda *_, **__: backend)
    base, x = Rounded(torch.rand(24, 64)), torch.randn(3, 64)
    model = get_peft_model(Wrapper(base), SmoaConfig(r=4, target_modules=["layer"], init_weights=False))
    assert model.unload().layer is base
    model = get_peft_model(Wrapper(base), SmoaConfig(r=4, target_modules=["layer"], init_weights=False))
    expected, plain = model(x).detach(), base(x)
    merged = model.merge_and_unload()
    assert type(merged.layer) is Rounded
    assert merged.layer is not base
    assert relative_error(merged(x) - plain, (expected - plain).double()) < 0.2
    assert torch.equal(base(x), plain)


# CPUs with AVX512-BF16


def evaluated(kind: str, out_features: int = 64, in_features: int = 256) -> tuple[nn.Module, Tensor]:
    """A layer that was evaluated where bitsandbytes repacks it, or as if, and the weight that it is evaluated with."""
    base = quantized_layer(kind, out_features, in_features).eval()
    state = copy.deepcopy(base.weight.quant_state)
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
    state.absmax = state.absmax.bfloat16().float()  # bitsandbytes rounds the scales
    expected = bnb.functional.dequantize_4bit(base.weight.data, state)
    base.support_avx512bf16_for_cpu = True
    if bnb.functional.has_avx512bf16():
        base(torch.randn(2, in_features))
    else:
        base.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    assert base.weight.quant_state.packing_format_for_cpu
    return base, expected


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "fp4"])
def test_a_weight_that_was_repacked_for_evaluation_is_unpacked_for_good(kind: str) -> None:
    base, expected = evaluated(kind)
    layer = adapted_quantized(base)
    assert torch.equal(layer.pristine_weight(), expected)
    x = torch.randn(5, 256, requires_grad=True)
    layer.train()(x).sum().backward()
    assert_close(x.grad, (weight_of(layer) + delta_of(layer)).sum(0).expand(5, -1), torch.float32)
    layer.eval()(x.detach())
    assert torch.equal(layer.pristine_weight(), expected)


def test_a_merged_weight_of_4_bits_writes_nothing_to_the_layer_that_unmerging_restores() -> None:
    base = quantized_layer("nf4", 64, 256)
    state, layer = base.quant_state, adapted_quantized(base)
    layer.merge()
    assert layer.base_layer.quant_state is not state
    assert base.quant_state is state  # which bitsandbytes takes where FSDP has replaced the weight
    layer.unmerge()
    assert layer.base_layer.quant_state is state


def test_an_adapter_whose_labels_are_loaded_is_evaluated_on_the_weight_as_it_was() -> None:
    base = quantized_layer("nf4", 64, 256).eval()
    base.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    expected = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    layer = inject_adapter_in_model(SmoaConfig(target_modules=["layer"]), Wrapper(base), low_cpu_mem_usage=True).layer
    base(torch.randn(2, 256))
    assert torch.equal(layer.pristine_weight(), expected)


def test_saving_a_model_unpacks_the_layers_without_an_adapter_right() -> None:
    base, expected = evaluated("nf4")
    model = Wrapper(nn.Sequential(base, nn.Linear(64, 8)))
    get_peft_model(model, SmoaConfig(r=4, target_modules=["layer.1"])).state_dict()
    assert torch.equal(bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state), expected)


# what can't be adapted_quantized


class Float8Linear(nn.Linear):
    """As transformers has it: a Linear whose weight counts as floating point, but is 8 bits without its scales."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)


def refused(layer: nn.Module, message: str) -> None:
    model = Wrapper(layer)
    with pytest.raises(UnsupportedModuleError, match=message):
        get_peft_model(model, SmoaConfig(r=4, target_modules=["layer"]))
    assert model.layer is layer


def test_an_eight_bit_float_without_a_backend_is_refused_by_name() -> None:
    refused(Float8Linear(), r"Float8Linear, which PEFT can't dequantize: .*load the model with dequantize=True")


def test_a_format_that_peft_can_not_dequantize_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class PackedLinear(nn.Module):
        """As GPTQ, AWQ and AQLM have it: no Linear at all."""

        in_features = out_features = 8

    backend = SimpleNamespace(backend_name="gptq", supports_merge=False)
    monkeypatch.setattr(quantized, "find_quantization_backend", lambda *_, **__: backend)
    refused(PackedLinear(), r"PackedLinear, which PEFT can't dequantize: ΔW is relative to the weight")
