"""Which merges go from disk to disk, which take a loaded model, and what rounding takes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoa import AdapterFileError, SmoaConfig
from smoa.export.checkpoint import Shards, adapter_config
from smoa.export.streaming import RoundingLoss, SavedAdapter, plan_stream
from tests.support import tiny_models
from tests.support.adapter_files import rewritten, with_settings

TARGETS = ["q_proj", "down_proj"]


def saved(folder: Path, family: str = "llama", **config: Any) -> PeftModel:
    """Base and adapter in `folder`; the adapted model."""
    model = tiny_models.build(family)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    options = {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": TARGETS} | config
    adapted = get_peft_model(model, SmoaConfig(**options, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def adapter_in(folder: Path) -> SavedAdapter:
    config = adapter_config(folder / "adapter")
    assert isinstance(config, SmoaConfig)
    return SavedAdapter(folder / "adapter", config)


@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 3)], ids=["lacks", "has in another shape"])
def test_a_weight_that_the_checkpoint_lacks_takes_a_loaded_model(tensor: Tensor | None, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    if tensor is not None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensor
    save_file(tensors, file)
    assert plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base")) is None


def test_a_module_trained_whole_replaces_the_checkpoints_tensor(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["input_layernorm"])
    plan = plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base"))
    assert plan is not None
    assert list(plan[1]) == [f"model.layers.{number}.input_layernorm.weight" for number in range(2)]


def test_layers_that_the_model_does_not_have_are_told(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(AdapterFileError, match=r"the adapter is for .* and 3 more that BertForSequenceClassification"):
        plan_stream(adapter_in(tmp_path), tiny_models.build("bert"), Shards(tmp_path / "base"))


def test_a_layer_that_lacks_a_part_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    part = "base_model.model.model.layers.1.self_attn.q_proj.smoa_B.weight"
    with_settings(rewritten(tmp_path / "adapter", lambda tensors: tensors.pop(part)))
    with pytest.raises(AdapterFileError, match=r"layers\.1\.self_attn\.q_proj has .*'smoa_A\.weight'.*, expected"):
        adapter_in(tmp_path)


def test_where_nothing_changes_nothing_is_lost() -> None:
    loss = RoundingLoss()
    assert loss.total == 0
    loss.add("same", torch.full((2, 2), 1.003), torch.full((2, 2), 1.003), torch.bfloat16)
    assert (loss.total, loss.by_layer) == (0.0, {"same": 0.0})
