"""Samples of one batch with different adapters: each gets what its adapter alone gives."""

from typing import Any

import pytest
import torch
from peft import TaskType
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from smoa.kernels import blocks
from tests.support import tiny
from tests.support.layers import adapted_layer, assert_close, base_layer, oracle_output, relative_error
from tests.support.layers import add_adapter as add_layer_adapter
from tests.support.tiny import QV, adapted, add_adapter, logits


@pytest.mark.parametrize("settings", [{}, {"r": 30, "num_blocks": 20}], ids=["", "narrow v_proj"])
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(
    tiny_llama: PreTrainedModel, settings: dict[str, int]
) -> None:
    model = adapted(tiny_llama, **settings)
    add_adapter(model, "other", **{"modulation": "none", "num_blocks": 3} | settings)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    names = ["other", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        assert_close(mixed[i], alone[name][i])


@torch.no_grad()
def test_adapters_of_other_blocks_take_a_product_of_their_own(tiny_llama: PreTrainedModel) -> None:
    model, alone = adapted(tiny_llama, partition="random"), []
    torch.manual_seed(1)
    add_adapter(model, "other", partition="random")
    for name in (names := ["default", "other", "default"]):
        model.set_adapter(name)
        alone.append(logits(model))
    for i, mixed in enumerate(logits(model, adapter_names=names)):
        assert_close(mixed, alone[i][i])


@pytest.mark.parametrize("large", [0, 1 << 13])
def test_a_weight_that_trains_gets_its_gradient_through_each_rows_adapter(
    large: int, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "LARGE_BLOCK", large)
    model = adapted(tiny_llama)
    add_adapter(model, "other")
    names = ["default", "other", "default"]
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    mixed = model(**tiny.batch("llama"), adapter_names=names).logits
    expected = torch.zeros_like(weight)
    for i, name in enumerate(names):
        model.set_adapter(name)
        expected += torch.autograd.grad(model(**tiny.batch("llama")).logits[i].square().sum(), weight)[0]
    found = torch.autograd.grad(mixed.square().sum(), weight)[0]
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
def test_a_mixed_batch_trains_tokens_of_a_head_in_the_rows_of_their_adapter_only() -> None:
    model = adapted(tiny.build("gemma3"), target_modules=["lm_head"], trainable_token_indices=[3, 5])
    model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].mul_(2)
    alone = logits(model, "gemma3")
    mixed = logits(model, "gemma3", adapter_names=["default", "__base__", "__base__"])
    assert_close(mixed[0], alone[0])
    assert_close(mixed[1:], logits(tiny.build("gemma3"), "gemma3")[1:])


@pytest.mark.parametrize("length", [1, 200])  # for 200 tokens at rank 2 it pays to form ΔW
@pytest.mark.parametrize("r", [3, 6])
@torch.no_grad()
def test_the_base_layers_output_is_left_to_others_who_have_it(r: int, length: int) -> None:
    layer = adapted_layer(base_layer(13, 10), num_blocks=3, r=r)
    add_layer_adapter(layer, "other", num_blocks=3, r=r)
    x, names = torch.randn(2, length, 10, dtype=torch.float64), ["other", "default"]
    expected = torch.stack([oracle_output(layer, row, name) for row, name in zip(x, names, strict=True)])
    assert_close(layer(x, adapter_names=names), expected)
    seen: list[Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output))
    assert_close(layer(x, adapter_names=names), expected)
    assert_close(seen[0], nn.functional.linear(x, layer.base_weight(), layer.get_base_layer().bias))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("settings", [{"num_blocks": 1}, {"num_blocks": 3, "partition": "contiguous"}], ids=str)
def test_an_input_that_is_a_transposed_view_is_served(settings: dict[str, Any], trains: bool) -> None:
    layer = adapted_layer(base_layer(13, 10), r=3, **settings)
    add_layer_adapter(layer, "other", r=3, **settings)
    x, names = torch.randn(2, 10, 5, dtype=torch.float64).mT, ["other", "default"]
    expected = torch.stack([oracle_output(layer, row, name) for row, name in zip(x, names, strict=True)])
    with torch.set_grad_enabled(trains):
        assert_close(layer(x, adapter_names=names), expected)
        layer.set_adapter("default")
        assert_close(layer(x), torch.stack([oracle_output(layer, row, "default") for row in x]))


def test_names_that_fit_no_batch_or_model_are_refused(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    for names, reason in {("default",): "adapter_names", ("default", "nobody", "default"): "nobody"}.items():
        with pytest.raises(ValueError, match=reason):
            logits(model, adapter_names=[*names])
    with pytest.raises(ValueError, match="defualt"):
        logits(model, adapter_names=["defualt"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=["default"] * 3)


@pytest.mark.parametrize(
    ("family", "setting", "by"),
    [
        ("llama", {}, "argument"),
        ("llama", {"num_beams": 2}, "config"),
        ("t5", {"num_beams": 2}, "the model's config"),
        ("llama", {"num_beams": 2}, "argument over both"),
        ("llama", {"num_beams": 3, "num_return_sequences": 2}, "config"),
        ("t5", {"num_beams": 3, "num_return_sequences": 2}, "argument"),
        ("llama", {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, "config"),
    ],
    ids=str,
)
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(
    family: str, setting: dict[str, int], by: str
) -> None:
    targets = ["q", "v"] if family == "t5" else QV
    task = TaskType.SEQ_2_SEQ_LM if family == "t5" else TaskType.CAUSAL_LM
    model = adapted(tiny.build(family), target_modules=targets, task_type=task)
    add_adapter(model, "other", target_modules=targets, task_type=task)
    inputs = tiny.batch(family)
    inputs = {name: inputs[name][:2] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | setting
    options: dict[str, Any] = {"generation_config": GenerationConfig(**settings)}
    if by == "argument":
        options = settings
    elif by == "the model's config":
        model.generation_config.update(**settings)
        options = {}
    elif by == "argument over both":
        model.generation_config.num_beams = 5
        options |= {"generation_config": GenerationConfig(**settings | {"num_beams": 4}), "num_beams": 1} | setting
    alone = []
    copies = setting.get("num_return_sequences", 1)
    for i, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone.append(model.generate(**inputs, **options)[i * copies : (i + 1) * copies])
    mixed = model.generate(**inputs, **options, adapter_names=["other", "default"])
    assert torch.equal(mixed, torch.cat(alone))


def test_a_forward_repeats_no_names_whatever_generate_would_do(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama, task_type=TaskType.CAUSAL_LM)
    names = ["default", "__base__", "default"]
    expected = logits(model, adapter_names=names)
    model.generation_config.num_beams = 3
    assert torch.equal(logits(model, adapter_names=names), expected)


def test_a_base_weight_that_trains_gets_the_gradient_through_its_update() -> None:
    layer = adapted_layer(base_layer(12, 12), num_blocks=2, r=4)
    weight = layer.get_base_layer().weight.requires_grad_()
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    (alone,) = torch.autograd.grad(layer(x).square().sum(), weight)
    (mixed,) = torch.autograd.grad(layer(x, adapter_names=["default", "default"]).square().sum(), weight)
    assert_close(mixed, alone)
