"""Samples of one batch with different adapters."""

from __future__ import annotations

import pytest
import torch
from peft import TaskType
from transformers import PreTrainedModel

from tests.support import tiny_models
from tests.support.adapted_models import QV, adapted, add_adapter
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close


def test_a_mixed_batch_gives_what_each_adapter_gives_alone(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    add_adapter(model, "other", modulation="none", num_blocks=3)
    alone = {"__base__": None, "default": None, "other": None}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    names = ["other", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        assert_close(mixed[i], alone[name][i])


@pytest.mark.parametrize("names", [["default"], ["default"] * 4])
def test_a_mixed_batch_of_another_length_is_refused(tiny_llama: PreTrainedModel, names: list[str]) -> None:
    with pytest.raises(ValueError, match="adapter_names"):
        logits(adapted(tiny_llama), adapter_names=names)


def test_a_mixed_batch_with_an_unknown_adapter_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="nobody"):
        logits(adapted(tiny_llama), adapter_names=["default", "nobody", "default"])


def test_a_mixed_batch_in_training_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"(?i)training|eval"):
        logits(adapted(tiny_llama).train(), adapter_names=["default"] * 3)


def test_a_mixed_batch_of_a_merged_model_is_refused(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=["default"] * 3)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(family: str, num_beams: int) -> None:
    targets = ["q", "v"] if family == "t5" else QV
    task = TaskType.SEQ_2_SEQ_LM if family == "t5" else TaskType.CAUSAL_LM
    model = adapted(tiny_models.build(family), target_modules=targets, task_type=task)
    add_adapter(model, "other", target_modules=targets, task_type=task)
    inputs = tiny_models.batch(family)
    inputs = {name: inputs[name][:2] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    alone = []
    for i, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone.append(model.generate(**inputs, **settings)[i])
    mixed = model.generate(**inputs, **settings, adapter_names=["other", "default"])
    assert torch.equal(mixed, torch.stack(alone))
