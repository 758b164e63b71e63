"""Samples of one batch with different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import TaskType
from transformers import GenerationConfig, PreTrainedModel

from tests.support import tiny_models
from tests.support.adapted_models import QV, adapted, add_adapter
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close


@pytest.mark.parametrize("settings", [{}, {"r": 30, "num_blocks": 20}], ids=["", "narrow v_proj"])
@pytest.mark.filterwarnings("ignore:num_blocks=20 is larger than a side of 2 of 4 targets:UserWarning")
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


def test_names_that_fit_no_batch_or_model_are_refused(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    for names, reason in {("default",): "adapter_names", ("default", "nobody", "default"): "nobody"}.items():
        with pytest.raises(ValueError, match=reason):
            logits(model, adapter_names=[*names])
    with pytest.raises(ValueError, match="did you mean 'default'"):
        logits(model, adapter_names=["defualt"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=["default"] * 3)


@pytest.mark.parametrize(
    ("family", "setting", "by"),
    [
        ("llama", {}, "argument"),
        ("llama", {"num_beams": 2}, "positional config"),
        ("t5", {"num_beams": 2}, "the model's config"),
        ("llama", {"num_beams": 2}, "argument over both"),
        ("llama", {"num_beams": 3, "num_return_sequences": 2}, "config"),
        ("t5", {"num_beams": 3, "num_return_sequences": 2}, "argument"),
    ],
    ids=str,
)
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(
    family: str, setting: dict[str, int], by: str
) -> None:
    targets = ["q", "v"] if family == "t5" else QV
    task = TaskType.SEQ_2_SEQ_LM if family == "t5" else TaskType.CAUSAL_LM
    model = adapted(tiny_models.build(family), target_modules=targets, task_type=task)
    add_adapter(model, "other", target_modules=targets, task_type=task)
    inputs = tiny_models.batch(family)
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
    by_position = by == "positional config"
    positional = (inputs.pop("input_ids"), options.pop("generation_config")) if by_position else ()
    alone = []
    copies = setting.get("num_return_sequences", 1)
    for i, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone.append(model.generate(*positional, **inputs, **options)[i * copies : (i + 1) * copies])
    mixed = model.generate(*positional, **inputs, **options, adapter_names=["other", "default"])
    assert torch.equal(mixed, torch.cat(alone))


def test_a_forward_repeats_no_names_whatever_generate_would_do(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama, task_type=TaskType.CAUSAL_LM)
    names = ["default", "__base__", "default"]
    expected = logits(model, adapter_names=names)
    model.generation_config.num_beams = 3
    assert torch.equal(logits(model, adapter_names=names), expected)
