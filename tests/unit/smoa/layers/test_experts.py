"""SMoA on a parameter of experts: state, output, merge."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from smoa import MergeError, SmoaConfig, UnsupportedModuleError
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import UNDECIDED
from tests import reference
from tests.support.decompositions import NoDecomposition
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


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"expert_partition": "each"}) for family in FAMILIES),
        ("gpt_oss", {"expert_partition": "shared"}),
        ("qwen3_moe", {"modulation": "none"}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_oracles_weights(family: str, settings: dict[str, str]) -> None:
    wrapped = experts_of(family, **settings)
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


K, R = SETTINGS["num_blocks"], SETTINGS["r"]


@pytest.mark.parametrize(("expert_partition", "parts"), [("each", 10), ("shared", 2)])
def test_factors_labels_and_scales_of_all_matrices_are_saved_in_one_tensor_each(
    expert_partition: str, parts: int
) -> None:
    wrapper = wrappers(experts_of("gpt_oss", expert_partition=expert_partition))["gate_up_proj"]
    state = {name: tuple(tensor.shape) for name, tensor in wrapper.state_dict().items() if "base_layer" not in name}
    assert state == {
        "smoa_A.default.weight": (10 * R, 24 // K),
        "smoa_B.default.weight": (6, 10 * R),
        "smoa_row_labels.default": (parts, 16),
        "smoa_col_labels.default": (parts, 24),
        "smoa_block_scale.default": (10, K),
    }
    assert sorted(wrapper.saved_shapes("default")) == sorted(state.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_expert_has_the_oracles_blocks_and_scales_of_unit_rms(family: str) -> None:
    wrapper = wrappers(experts_of(family, scale="block"))["gate_up_proj"]
    for number, scales in enumerate(wrapper.block_scale("default")):
        weight = matrix_of(wrapper, number // 2, number % 2)
        rows, cols = (labels["default"][number] for labels in (wrapper.smoa_row_labels, wrapper.smoa_col_labels))
        assert (rows.tolist(), cols.tolist()) == reference.spectral_labels(weight, K)
        blocks = [weight[rows == k][:, cols == k] for k in range(K)]
        assert_close(scales, torch.stack([1 / block.square().mean().sqrt() for block in blocks]), torch.float32)


def test_an_adapter_about_to_be_loaded_decomposes_nothing_until_it_is_used() -> None:
    base = experts_of("qwen3_moe")["experts"].get_base_layer()
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **SETTINGS)
    with NoDecomposition():
        wrapper = ParamWrapper(base, "default", "down_proj", config, "experts.down_proj", defer_partition=True)
    assert (wrapper.smoa_row_labels["default"] == UNDECIDED).all()
    assert wrapper.pending_partition
    wrapper.stack("default")
    assert (wrapper.smoa_row_labels["default"] < K).all()
    assert not wrapper.pending_partition


def test_experts_adapted_on_the_meta_device_are_partitioned_once_weights_are_there() -> None:
    with torch.device("meta"):
        base = nn.ModuleDict({"experts": build_mixture("qwen3_moe").model.layers[0].mlp.experts})
    model = inject_adapter_in_model(SmoaConfig(target_modules=[], target_parameters=EXPERTS, **SETTINGS), base)
    model.to_empty(device="cpu")
    ready = wrappers(experts_of("qwen3_moe"))
    for name, wrapper in wrappers(model).items():
        with torch.no_grad():
            wrapper.stored_weight().copy_(ready[name].stored_weight())
        own, expected = wrapper.stack("default"), ready[name].stack("default")
        for mine, theirs in zip(own.blocks, expected.blocks, strict=True):
            assert torch.equal(mine.row_labels, theirs.row_labels)
            assert torch.equal(mine.col_labels, theirs.col_labels)
        assert_close(own.rank_scale, expected.rank_scale)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapted_experts_are_loaded_onto_the_meta_device_and_moved_there(
    low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = get_peft_model(build_mixture("qwen3_moe"), SmoaConfig(target_parameters=EXPERTS, **SETTINGS))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = build_mixture("qwen3_moe")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")  # PyTorch's, as with LoRA
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for moved in (loaded, model.to("meta")):
        assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
        labels = {tensor.device.type for name, tensor in moved.state_dict().items() if "labels" in name}
        assert labels == {"cpu"}  # they stay in memory


def test_a_parameter_that_fsdp1_has_flattened_is_refused() -> None:
    wrapper = wrappers(experts_of("qwen3_moe"))["down_proj"]
    base: nn.Module = wrapper.get_base_layer()
    base.register_parameter("down_proj", None)
    with pytest.raises(UnsupportedModuleError, match=r"down_proj: FSDP1 has flattened this parameter.*use FSDP2"):
        wrapper.stored_weight()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_weight_is_the_oracles_of_each_expert_and_unmerging_restores_every_bit(family: str) -> None:
    wrapped = experts_of(family)
    for wrapper in wrappers(wrapped).values():
        before, halves = wrapper.stored_weight().detach().clone(), wrapper.layout.halves
        pairs = [
            (matrix_of(wrapper, number // halves, number % halves) + delta).detach()
            for number, delta in enumerate(oracle_deltas(wrapper))
        ]
        wrapper.merge()
        for number, expected in enumerate(pairs):
            assert_close(matrix_of(wrapper, number // halves, number % halves), expected)
        wrapper.unmerge()
        assert torch.equal(wrapper.stored_weight(), before)


def test_adapters_merged_one_after_the_other_are_both_made_from_the_pristine_weight() -> None:
    wrapped = experts_of("gpt_oss", dtype=torch.float32)
    add_second_adapter(wrapped)
    for wrapper in wrappers(wrapped).values():
        before = wrapper.stored_weight().detach().clone()
        expected = before + wrapper.get_delta_weight("default") + wrapper.get_delta_weight("second")
        wrapper.merge(adapter_names=["default"])
        assert_close(wrapper.get_delta_weight("second"), expected - wrapper.stored_weight())
        with pytest.warns(UserWarning, match="additionally merging second"):
            wrapper.merge(adapter_names=["second"])
        assert_close(wrapper.stored_weight(), expected)
        wrapper.unmerge()
        assert torch.equal(wrapper.stored_weight(), before)


def test_a_safe_merge_of_broken_factors_changes_nothing() -> None:
    wrapper = wrappers(experts_of("qwen3_moe"))["down_proj"]
    before = clone_leaf(wrapper.stored_weight())
    wrapper.smoa_B["default"].weight.data[0, -1] = float("inf")
    with pytest.raises(
        MergeError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        wrapper.merge(safe_merge=True)
    assert torch.equal(wrapper.stored_weight(), before)
    assert not wrapper.merged


def test_disabling_the_adapter_of_merged_experts_unmerges_them() -> None:
    wrapped = experts_of("qwen3_moe")
    before = {name: clone_leaf(wrapper.stored_weight()) for name, wrapper in wrappers(wrapped).items()}
    for layer in wrapped.modules():
        if isinstance(layer, SmoaLayer):
            layer.merge()
            layer.enable_adapters(False)
    wrapped["experts"](torch.randn(0, 24).double(), torch.ones(0, 2).long(), torch.ones(0, 2).double())
    assert all(torch.equal(wrapper.stored_weight(), before[name]) for name, wrapper in wrappers(wrapped).items())
