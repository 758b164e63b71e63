"""Mixtures of experts through the life of an adapter: trained, saved, loaded, merged, and beside other adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from smoa import ConfigError, MergeError, SmoaConfig
from smoa.hotswap import hotswap_adapter
from tests.support.decompositions import NoDecomposition
from tests.support.tiny_mixtures import EXPERTS, MIXTURES, build_mixture, tokens, wrappers
from tests.support.tolerance import assert_close

INTERFACED = sorted(set(MIXTURES) - {"llama4"})
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def adapted(family: str, **settings: Any) -> PeftModel:
    config = {"r": 7, "num_blocks": 3, "alpha": 4.0, "target_modules": [], "target_parameters": EXPERTS}
    torch.manual_seed(3)
    return get_peft_model(build_mixture(family), SmoaConfig(**config | settings))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def train_a_step(model: PeftModel, **options: Any) -> float:
    """One step of SGD on the adapter; returns the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=tokens(), labels=tokens(), **options).loss
    loss.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    return float(loss.detach())


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_is_trained_saved_and_loaded_without_a_decomposition(family: str, tmp_path: Path) -> None:
    model = adapted(family).train()
    before = logits(model)
    first = train_a_step(model)
    assert float(model(input_ids=tokens(), labels=tokens()).loss.detach()) < first
    model.eval().save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        with NoDecomposition():
            loaded = PeftModel.from_pretrained(build_mixture(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.eval()), logits(model))
    assert not torch.equal(logits(loaded), before)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_merged_model_says_the_same_under_the_same_names_and_unmerging_restores_every_bit(family: str) -> None:
    model, plain = adapted(family, init_weights=False), build_mixture(family)
    expected, state = logits(model), plain.state_dict()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(input_ids=tokens(), **options)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    weights = {name: wrapper.stored_weight() for name, wrapper in wrappers(model).items()}
    for name, weight in weights.items():
        assert any(torch.equal(weight, tensor) for key, tensor in state.items() if key.endswith(name))
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert torch.equal(merged.generate(input_ids=tokens(), **options), generated)
    assert merged.state_dict().keys() == state.keys()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("family", INTERFACED)
def test_every_implementation_of_the_experts_gives_the_same_output_and_gradients(family: str) -> None:
    found = []
    for implementation in IMPLEMENTATIONS:
        model = adapted(family, init_weights=False)
        model.base_model.model.set_experts_implementation(implementation)
        output = model(input_ids=tokens()).logits
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in found[1:]:
        for own, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(own, first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = adapted(family, init_weights=False).train()
        if checkpoint:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for own, plain in zip(*gradients, strict=True):
        assert_close(own, plain)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("qwen3_moe", "grouped_mm"), ("gpt_oss", "eager"), ("gpt_oss", "batched_mm"), ("llama4", None)],
)
def test_autocast_and_half_precision_train(family: str, implementation: str | None) -> None:
    model = adapted(family).train()
    if implementation is not None:
        model.base_model.model.set_experts_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        train_a_step(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    train_a_step(half)


def test_a_file_names_parameters_and_not_how_their_wrappers_are_nested(tmp_path: Path) -> None:
    model = adapted("mixtral", target_parameters=EXPERTS[1:], init_weights=False)
    model.add_adapter("both", SmoaConfig(target_modules=[], target_parameters=EXPERTS, init_weights=False))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "both" / "adapter_model.safetensors").keys()
    place = "base_model.model.model.layers.0.mlp.experts"
    assert f"{place}.down_proj.smoa_A.weight" in names
    assert f"{place}.gate_up_proj.smoa_row_labels" in names
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(build_mixture("mixtral"), str(tmp_path / "both")).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("family", "partition"), [("qwen3_moe", "shared"), ("gpt_oss", "each"), ("llama4", "shared")])
def test_a_weighted_sum_of_adapters_of_experts_is_exact(family: str, partition: str) -> None:
    model = adapted(family, init_weights=False, expert_partition=partition)
    settings = {"r": 4, "num_blocks": 3, "expert_partition": partition, "init_weights": False, "scale": "paper"}
    model.add_adapter("second", SmoaConfig(target_modules=[], target_parameters=EXPERTS, **settings))
    model.add_weighted_adapter(["default", "second"], [0.7, -1.3], "sum")
    for wrapper in wrappers(model).values():
        assert wrapper.r["sum"] == 11
        assert_close(wrapper.delta("sum"), 0.7 * wrapper.delta("default") - 1.3 * wrapper.delta("second"))
    model.add_weighted_adapter(["second"], [-2.0], "scaled", combination_type="linear")
    for wrapper in wrappers(model).values():
        assert_close(wrapper.delta("scaled"), -2.0 * wrapper.delta("second"))


def test_adapters_of_experts_with_other_partitions_are_not_combined() -> None:
    model = adapted("mixtral")
    random = {"num_blocks": 3, "partition": "random"}
    model.add_adapter("second", SmoaConfig(target_modules=[], target_parameters=EXPERTS, **random))
    with pytest.raises(MergeError, match=r"experts.*adapters default, second have different partitions"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.add_adapter("third", SmoaConfig(target_modules=[], target_parameters=EXPERTS[1:], num_blocks=3))
    with pytest.raises(MergeError, match="different target_parameters"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("qwen3_moe", {"r": 4, "alpha": 5.0}),
        ("gpt_oss", {"partition": "random"}),
        ("llama4", {"target_parameters": EXPERTS[1:]}),
    ],
)
def test_an_adapter_of_experts_is_swapped_in_place(family: str, other: dict[str, Any], tmp_path: Path) -> None:
    new = adapted(family, init_weights=False, **other).eval()
    for parameter in new.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    new.save_pretrained(tmp_path)
    model = adapted(family, init_weights=False).eval()
    before = logits(model)
    assert not torch.allclose(logits(new), before)
    model.save_pretrained(tmp_path / "first")
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model), logits(new))
    hotswap_adapter(model, tmp_path / "first")
    assert_close(logits(model), before)
    adapted(family, expert_partition="shared").save_pretrained(tmp_path / "unfit")
    with pytest.raises(ConfigError, match="has expert_partition='shared', not 'each'"):
        hotswap_adapter(model, tmp_path / "unfit")
    assert_close(logits(model), before)
