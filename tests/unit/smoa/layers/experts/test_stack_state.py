from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from smoa import SmoaConfig, UnsupportedModuleError
from smoa.layers.experts import ParamWrapper
from smoa.maths.blocks import UNDECIDED
from smoa.maths.factors import split_rank
from tests import reference
from tests.support.decompositions import NoDecomposition
from tests.support.tiny_mixtures import EXPERTS, SETTINGS, build_mixture, experts_of, matrix_of, wrappers
from tests.support.tolerance import assert_close

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


def test_factors_start_as_those_of_a_linear_layer() -> None:
    wrapper = wrappers(experts_of("qwen3_moe", init_weights=True))["down_proj"]
    A, B = wrapper.factors("default")
    assert not B.any()
    in_A, _ = reference.real_entries(24, 16, split_rank(R, K))
    for part in A.split(R):
        assert part[in_A].abs().min() > 0
        assert not part[~in_A].any()
        assert part.abs().max() <= 5**-0.5


def test_a_cast_keeps_labels_and_the_bits_of_the_scales() -> None:
    wrapper = wrappers(experts_of("qwen3_moe", dtype=torch.float32))["down_proj"]
    before = wrapper.block_scale("default").clone()
    wrapper.to(torch.bfloat16)
    assert wrapper.smoa_A["default"].weight.dtype == torch.bfloat16
    assert wrapper.smoa_row_labels["default"].dtype == torch.uint8
    assert torch.equal(wrapper.block_scale("default"), before)
    assert wrapper.smoa_block_scale["default"].dtype == torch.float32


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


def test_labels_written_into_a_pending_adapter_are_kept() -> None:
    done = wrappers(experts_of("qwen3_moe"))["down_proj"]
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **SETTINGS)
    wrapper = ParamWrapper(done.get_base_layer(), "default", "down_proj", config, "experts.down_proj", True)
    wrapper.load_state_dict(done.state_dict(), strict=False)
    with NoDecomposition():
        own, expected = wrapper.stack("default").blocks[3], done.stack("default").blocks[3]
    assert torch.equal(own.row_labels, expected.row_labels)
    assert torch.equal(own.col_labels, expected.col_labels)


def test_a_parameter_that_fsdp1_has_flattened_is_refused() -> None:
    wrapper = wrappers(experts_of("qwen3_moe"))["down_proj"]
    base: nn.Module = wrapper.get_base_layer()
    base.register_parameter("down_proj", None)
    with pytest.raises(UnsupportedModuleError, match=r"down_proj: FSDP1 has flattened this parameter.*use FSDP2"):
        wrapper.stored_weight()
