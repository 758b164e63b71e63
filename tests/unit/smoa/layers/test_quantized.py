"""Quantized layers: the oracle on the dequantized weight, nothing dense kept, merged as PEFT does, undone bit for bit.

bitsandbytes is always there; torchao and HQQ are tested where they are installed.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoa import MergeError, SmoaConfig, UnsupportedModuleError, cached_weights
from smoa.layers import quantized
from smoa.layers.layer import SmoaLayer
from smoa.layers.quantized import QuantizedLinear
from smoa.maths import spectrum_cache
from tests import reference
from tests.support import tiny_models
from tests.support.layers import Wrapper, clone_leaf, factors, labels, oracle_delta, randomise
from tests.support.quantized import (
    BITSANDBYTES,
    KINDS,
    adapted,
    in_4_bits,
    quantized_layer,
    quantized_model,
    stored_bits,
)
from tests.support.tolerance import assert_close

LOST = "relative error of ΔW"


@pytest.fixture(autouse=True)
def _one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks what it evaluates; these tests compare on every CPU alike."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False, raising=False)


def weight_of(layer: SmoaLayer) -> Tensor:
    """The dequantized pristine weight."""
    return layer.pristine_weight().double()


def delta_of(layer: SmoaLayer, adapter: str = "default") -> Tensor:
    """The oracle's ΔW on the dequantized weight, float64."""
    return oracle_delta(layer, adapter, weight=weight_of(layer))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


def smoa_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def adapted_model(base: nn.Module, **config: Any) -> PeftModel:
    settings = {"r": 4, "num_blocks": 2, "alpha": 8, "target_modules": "all-linear"} | config
    model = get_peft_model(base, SmoaConfig(**settings))
    for layer in smoa_layers(model):
        randomise(layer)
    return model


# inject, compute, train


@pytest.mark.parametrize("kind", KINDS)
def test_the_partition_is_that_of_the_dequantized_weight(kind: str) -> None:
    layer = adapted(quantized_layer(kind))
    assert isinstance(layer, QuantizedLinear)
    assert labels(layer) == reference.spectral_labels(weight_of(layer), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_values_and_gradients_are_the_oracles_on_the_dequantized_weight(kind: str, modulation: str) -> None:
    base = quantized_layer(kind)
    layer = adapted(base, modulation=modulation).train()
    x, gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 24)
    y = layer(x)
    own = torch.autograd.grad(y, [x, *factors(layer)], gradient)
    leaves = [clone_leaf(t.double()) for t in (x, *factors(layer))]
    weight = weight_of(layer)
    delta = oracle_delta(layer, weight=weight, A=leaves[1], B=leaves[2])
    expected = reference.forward(leaves[0], weight, base.bias.double(), [delta])
    assert_close(y, expected, torch.float32)
    for mine, theirs in zip(own, torch.autograd.grad(expected, leaves, gradient.double()), strict=True):
        assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_product_is_the_quantized_layers_own(kind: str) -> None:
    base = quantized_layer(kind).eval()
    layer = adapted(base).eval()
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), base(x) + layer.branch_output(x, "default"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_for_the_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(quantized_layer(kind, 96, 128)).train()
    dense: list[weakref.ref[Tensor]] = []
    sizes: list[int] = []
    dequantized = quantized.dequantized

    def recorded(*arguments: Any) -> Tensor:
        dense.append(weakref.ref(weight := dequantized(*arguments)))
        return weight

    monkeypatch.setattr(quantized, "dequantized", recorded)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        y = layer.branch_output(x, "default")
    assert len(dense) == 1
    assert dense[0]() is None
    assert max(sizes) < 96 * 128 // 3
    y.sum().backward()
    assert len(dense) == 2  # dequantized again
    assert dense[1]() is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    layer = adapted(quantized_layer(kind), smoa_dropout=0.5).train()
    x = torch.randn(5, 64, requires_grad=True)
    leaves = [x, *factors(layer)]
    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).square().sum(), leaves)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for expected, leaf in zip(plain, leaves, strict=True):
        assert_close(leaf.grad, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dropout_acts_on_the_adapters_input_alone(kind: str) -> None:
    base = quantized_layer(kind)
    layer = adapted(base, smoa_dropout=0.5).train()
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close(y - base(x), dropped.double() @ delta_of(layer).T, torch.float32)
    assert_close(layer.eval()(x) - base.eval()(x), x.double() @ delta_of(layer).T, torch.float32)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_inputs_dtype_and_a_small_update_survives(
    dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    layer = adapted(in_4_bits(compute_dtype)).train()
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


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_autocast_computes_the_branch_in_its_dtype(kind: str, modulation: str) -> None:
    layer = adapted(quantized_layer(kind), modulation=modulation).train()
    x = torch.randn(50, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        contribution = layer.branch_output(x, "default")
        y = layer(x)
    assert contribution.dtype == torch.bfloat16
    assert relative_error(contribution, x.detach().double() @ delta_of(layer).T) <= 1e-2
    y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in (x, *factors(layer)))


# torch's own, at the autograd functions of bitsandbytes
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles() -> None:
    layer = adapted(quantized_layer("nf4")).train()
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).sum(), [x, *factors(layer)])
    for own, theirs in zip(torch.autograd.grad(compiled(x).sum(), [x, *factors(layer)]), expected, strict=True):
        assert_close(own, theirs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_cached_weights_keep_the_blocks_of_the_update_alone(kind: str) -> None:
    layer = adapted(quantized_layer(kind)).eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = layer(x)
        with cached_weights(layer):
            assert_close(layer(x), expected)
            assert layer.smoa_weight_cache.effective is None
            kept = sum(block.numel() for cached in layer.smoa_weight_cache.updates for block in cached.entries)
            assert kept == sum(len(r) * len(c) for r, c in zip(*parts_of(layer), strict=True))


def parts_of(layer: SmoaLayer) -> tuple[list[Tensor], list[Tensor]]:
    partition = layer.blocks("default")
    return [partition.rows(k) for k in range(3)], [partition.cols(k) for k in range(3)]


# several adapters


@pytest.fixture
def two_adapters(tmp_path: Path) -> PeftModel:
    """An NF4 model with the adapters `default` and `other`, of another K."""
    model = adapted_model(quantized_model(tmp_path / "base"))
    model.add_adapter("other", SmoaConfig(r=6, num_blocks=3, target_modules="all-linear"))
    for layer in smoa_layers(model):
        randomise(layer, "other")
    return model.eval()


def test_the_updates_of_two_active_adapters_add_up(two_adapters: PeftModel) -> None:
    two_adapters.base_model.set_adapter(["default", "other"])
    layer = smoa_layers(two_adapters)[0]
    x = torch.randn(5, layer.in_features)
    expected = x.double() @ (delta_of(layer) + delta_of(layer, "other")).T
    assert_close(layer(x) - layer.base_layer(x), expected, torch.float32)


def test_a_mixed_batch_gives_each_sample_its_adapter(two_adapters: PeftModel) -> None:
    inputs = {key: value for key, value in tiny_models.batch("llama").items() if key != "labels"}
    alone = []
    with torch.no_grad():
        for row, name in enumerate(("default", "other")):
            two_adapters.set_adapter(name)
            alone.append(two_adapters(**inputs).logits[row])
        with two_adapters.disable_adapter():
            alone.append(two_adapters(**inputs).logits[2])
        mixed = two_adapters(**inputs, adapter_names=["default", "other", "__base__"]).logits
    assert_close(mixed, torch.stack(alone))


# merge and unmerge


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_layer_is_the_requantized_sum(kind: str) -> None:
    base = quantized_layer(kind)
    layer = adapted(base)
    exact = weight_of(layer) + delta_of(layer)
    step = requantization_step(kind, exact)
    layer.merge()
    assert ((layer.base_weight().double() - exact).abs() <= step).all()
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert layer.get_base_layer().bias is base.bias


def requantization_step(kind: str, weight: Tensor) -> Tensor:
    """An upper bound of what quantizing `weight` once more changes: half the widest gap of the code, of each block."""
    peak = weight.abs().reshape(len(weight), -1, 64).amax(-1, keepdim=True).expand(-1, -1, 64).reshape(weight.shape)
    return {"int8": 0.5 / 127, "torchao": 0.5 / 127, "hqq": 0.25}.get(kind, 0.2) * peak + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_puts_back_every_quantized_byte(kind: str) -> None:
    base = quantized_layer(kind)
    layer = adapted(base)
    before, x = stored_bits(base), torch.randn(5, 64)
    expected = layer(x)
    for _ in range(3):
        layer.merge()
        assert layer.get_base_layer() is not base
        assert stored_bits(base) == before  # set aside untouched
        layer.unmerge()
    assert layer.get_base_layer() is base
    assert stored_bits(base) == before
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_can_be_saved_and_has_nothing_set_aside_in_its_state(kind: str) -> None:
    layer = adapted(quantized_layer(kind))
    names = layer.state_dict().keys()
    layer.merge()
    assert layer.state_dict().keys() == names
    assert len(list(layer.modules())) == len(list(adapted(quantized_layer(kind)).modules()))


def test_disabling_a_merged_adapter_gives_the_base_back() -> None:
    base = quantized_layer("nf4")
    layer, x = adapted(base), torch.randn(5, 64)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert not layer.merged


def test_a_model_switched_to_training_while_merged_trains_after_unmerging() -> None:
    layer = adapted(quantized_layer("int8")).eval()
    layer.merge()
    layer.train()
    layer.unmerge()
    assert layer.get_base_layer().training


def test_every_merged_adapter_is_anchored_on_the_pristine_weight(two_adapters: PeftModel) -> None:
    layer = smoa_layers(two_adapters)[0]
    deltas = [delta_of(layer), delta_of(layer, "other")]
    before = stored_bits(layer.get_base_layer())
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following"):
        layer.merge(adapter_names=["other"])
    for name, delta in zip(("default", "other"), deltas, strict=True):
        assert_close(layer.delta(name), delta, torch.float32)
    together = layer.base_weight()
    layer.unmerge()
    layer.merge(adapter_names=["default", "other"])
    assert torch.equal(layer.base_weight(), together)
    layer.unmerge()
    assert stored_bits(layer.get_base_layer()) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merge_tells_what_rounding_lost_and_is_undone(tmp_path: Path, bits: int) -> None:
    model = adapted_model(quantized_model(tmp_path, **{f"load_in_{bits}bit": True})).eval()
    before = stored_bits(model)
    with pytest.warns(UserWarning, match=LOST) as warned:
        model.merge_adapter(safe_merge=True)
    told = next(
        float(str(one.message).split(f"{LOST} is ")[1].split()[0]) for one in warned if LOST in str(one.message)
    )
    layers = smoa_layers(model)
    kept = [layer.base_weight().double() - weight_of(layer) for layer in layers]
    deltas = [delta_of(layer) for layer in layers]
    error = torch.stack([(k - d).norm() for k, d in zip(kept, deltas, strict=True)]).norm()
    assert told == pytest.approx(float(error / torch.stack([d.norm() for d in deltas]).norm()), rel=1e-2)
    model.unmerge_adapter()
    assert stored_bits(model) == before


def test_merge_and_unload_leaves_a_quantized_model_and_keeps_nothing(tmp_path: Path) -> None:
    model = adapted_model(quantized_model(tmp_path)).eval()
    set_aside = [weakref.ref(layer.get_base_layer()) for layer in smoa_layers(model)]
    inputs = tiny_models.batch("llama")
    with pytest.warns(UserWarning, match=LOST):
        merged = model.merge_and_unload(safe_merge=True)
    del model
    gc.collect()
    assert all(reference() is None for reference in set_aside)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
    assert torch.isfinite(merged(**inputs).loss)


def test_an_untrained_adapter_merges_without_a_report(tmp_path: Path) -> None:
    model = get_peft_model(quantized_model(tmp_path), SmoaConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter()  # warnings are errors here


def test_a_broken_adapter_is_refused_under_safe_merge_and_nothing_is_changed(tmp_path: Path) -> None:
    model = adapted_model(quantized_model(tmp_path))
    before = stored_bits(model)
    with torch.no_grad():
        factors(smoa_layers(model)[-1])[0][0, 0] = float("nan")
    changed = stored_bits(model)
    with pytest.raises(MergeError, match=r"down_proj: merging default gives NaN"):
        model.merge_adapter(safe_merge=True)
    assert stored_bits(model) == changed != before


def test_merging_a_copy_leaves_the_original_alone() -> None:
    base = quantized_layer("nf4")
    layer = adapted(base)
    before, statistics, x = stored_bits(base), base.quant_state, torch.randn(5, 64)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    copied.merge()
    assert stored_bits(base) == before
    assert base.quant_state is statistics
    assert torch.equal(layer(x), expected)


# save and load


@pytest.mark.parametrize("options", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_an_adapter_moves_to_a_full_precision_base_and_back(
    tmp_path: Path, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = adapted_model(quantized_model(tmp_path / "base", **options)).eval()
    expected = trained(**tiny_models.batch("llama")).logits
    trained.save_pretrained(tmp_path / "adapter")

    def decompose(weight: Tensor) -> None:
        raise AssertionError("a loaded adapter decomposes nothing")

    monkeypatch.setattr(spectrum_cache, "spectral_scores", decompose)
    spectrum_cache.clear_spectrum_cache()
    full = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "adapter")
    plain = [module for module in full.modules() if isinstance(module, SmoaLayer)]
    for ours, theirs in zip(plain, smoa_layers(trained), strict=True):
        assert labels(ours) == labels(theirs)
        assert_close(ours.delta("default"), oracle_delta(theirs, weight=ours.base_weight()), torch.float32)
    full.save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(quantized_model(tmp_path / "base", **options), tmp_path / "back").eval()
    assert torch.equal(back(**tiny_models.batch("llama")).logits, expected)


# training a model


# Not ours: PEFT calls transformers by a name that transformers renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_prepared_for_kbit_training_learns(tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(
        quantized_model(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(base, SmoaConfig(r=8, num_blocks=2, alpha=64, target_modules="all-linear")).train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".smoa_" in name
    }
    frozen = {name: bits for name, bits in stored_bits(model).items() if ".smoa_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**tiny_models.batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {name: bits for name, bits in stored_bits(model).items() if ".smoa_" not in name} == frozen


def test_the_projections_of_gpt2_are_quantized_and_adapted_too(tmp_path: Path) -> None:
    model = adapted_model(quantized_model(tmp_path, "gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    layer = smoa_layers(model)[0]
    x = torch.randn(5, layer.in_features)
    assert_close(layer(x) - layer.base_layer(x), x.double() @ delta_of(layer).T, torch.float32)


# CPUs with AVX512-BF16


def test_a_weight_that_was_repacked_for_evaluation_is_unpacked_for_good() -> None:
    base = quantized_layer("nf4", 32, 64)
    expected = base.weight.quant_state, bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    base.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    base.support_avx512bf16_for_cpu = True
    layer = adapted(base)
    assert relative_error(layer.pristine_weight(), expected[1].double()) < 2**-8  # bitsandbytes rounds the scales
    assert not base.support_avx512bf16_for_cpu
    assert not base.weight.quant_state.packing_format_for_cpu
    x = torch.randn(5, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert_close(x.grad, (weight_of(layer) + delta_of(layer)).sum(0).expand(5, -1), torch.float32)


# what can't be adapted


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
    refused(Float8Linear(), r"layer: .*Float8Linear, for which PEFT has no quantization backend; quantize it with")


def test_a_layer_that_is_not_quantized_yet_is_refused() -> None:
    refused(bnb.nn.Linear4bit(8, 8), r"layer: .*Linear4bit that holds torch.float32: it is not quantized yet")
    refused(bnb.nn.Linear8bitLt(8, 8), r"layer: .*Linear8bitLt that holds .*has_fp16_weights=False")


def test_a_format_that_peft_can_not_dequantize_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class PackedLinear(nn.Module):
        """As GPTQ, AWQ and AQLM have it: no Linear at all."""

        in_features = out_features = 8

    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr(quantized, "resolve_quantization_backend", lambda *_, **__: backend)
    refused(PackedLinear(), r"layer: .*PackedLinear: PEFT can't dequantize gptq, and ΔW is relative to the weight")


def test_what_peft_refuses_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> None:
        raise ValueError("torchao quantized layer detected but 'get_apply_tensor_subclass' was not provided")

    monkeypatch.setattr(quantized, "resolve_quantization_backend", resolve)
    refused(Float8Linear(), r"layer: SMoA can't adapt the quantized weight of a .*Float8Linear: torchao quantized")
