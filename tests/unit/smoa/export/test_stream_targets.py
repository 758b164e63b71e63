from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from smoa import SmoaConfig, UnsupportedModuleError
from smoa.export.merge import merge_and_save
from smoa.export.stream_targets import target_of
from tests.support.tiny_mixtures import COMMON, EXPERTS, build_mixture, tokens
from tests.support.tolerance import assert_close


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("expert_partition", ["each", "shared"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_mixture_is_merged_on_disk_under_the_names_of_its_checkpoint(
    family: str, expert_partition: str, tmp_path: Path
) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    build_mixture(family).save_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    separate = any(".experts.0." in name for name in names)
    assert separate is (family not in ("gpt_oss", "llama4"))
    config = SmoaConfig(
        r=4,
        num_blocks=2,
        init_weights=False,
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        expert_partition=expert_partition,
        task_type="CAUSAL_LM",
    )
    if family == "deepseek_v3":
        config.target_modules = {"q_b_proj"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    export = merge_and_save(adapter, merged)
    assert export.streamed
    assert export.loss.total < 1e-5
    assert load_file(merged / "model.safetensors").keys() == names
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(model))


def test_an_adapted_layer_that_computes_something_else_is_not_merged_on_disk() -> None:
    model = build_mixture("llama4")
    assert target_of("model.layers.0.self_attn.q_proj", model) is not None
    with pytest.raises(UnsupportedModuleError, match=r"feed_forward\.router: Llama4Router has a forward of its own"):
        target_of("model.layers.0.feed_forward.router", model)


def test_a_router_that_was_trained_is_merged_although_the_checkpoint_calls_it_otherwise(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    build_mixture("mixtral").save_pretrained(base)
    config = SmoaConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.nn.init.normal_(model.base_model.model.model.layers[0].mlp.gate.modules_to_save["default"].weight)
    model.save_pretrained(adapter)
    assert not merge_and_save(adapter, merged).streamed
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(model))


def test_a_mixture_in_memory_is_merged_with_what_rounding_took(tmp_path: Path) -> None:
    model = build_mixture("qwen3_moe")
    config = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules=[], target_parameters=EXPERTS)
    adapted = get_peft_model(build_mixture("qwen3_moe"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    export = merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=model, dtype="bfloat16")
    assert len(export.loss.by_layer) == 2
    assert 0 < export.loss.total < 1
    expected = adapted.merge_and_unload().to(torch.bfloat16)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(expected))


def test_an_adapter_of_more_experts_is_refused(tmp_path: Path) -> None:
    smaller = GptOssConfig(**COMMON, num_local_experts=4, head_dim=6)
    GptOssForCausalLM(smaller).save_pretrained(tmp_path / "base")
    config = SmoaConfig(r=4, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(build_mixture("gpt_oss"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="another shape"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
