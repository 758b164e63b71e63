"""Which merges go from disk to disk, which take a loaded model, and what rounding takes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def change_base(folder: Path, key: str, tensor: Tensor | None, name: str | None = None) -> None:
    """Rewrite one tensor of the checkpoint, or drop it, or give it another name."""
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    old = tensors.pop(key)
    if tensor is not None or name is not None:
        tensors[name or key] = old if tensor is None else tensor
    save_file(tensors, file)


def test_every_adapted_weight_is_merged_from_the_files_alone(tmp_path: Path) -> None:
    adapted = saved(tmp_path, alpha_pattern={"q_proj": 9.0})
    adapter, checkpoint = adapter_in(tmp_path), Shards(tmp_path / "base")
    plan = plan_stream(adapter, tiny_models.build("llama"), checkpoint)
    assert plan is not None
    assert plan.replaced == {}
    assert len(plan.weights) == 4
    for key, target in plan.weights.items():
        layer = adapted.base_model.model.get_submodule(target.name)
        expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert torch.allclose(adapter.merged(target, checkpoint.read(key)), expected, atol=1e-6)


def test_a_weight_that_the_checkpoint_lacks_takes_a_loaded_model(tmp_path: Path) -> None:
    saved(tmp_path)
    change_base(tmp_path, "model.layers.0.self_attn.q_proj.weight", None)
    assert plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base")) is None


def test_a_weight_of_another_shape_takes_a_loaded_model(tmp_path: Path) -> None:
    saved(tmp_path)
    change_base(tmp_path, "model.layers.0.self_attn.q_proj.weight", torch.zeros(3, 3))
    assert plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base")) is None


def test_a_module_trained_whole_replaces_the_checkpoints_tensor(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["input_layernorm"])
    plan = plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base"))
    assert plan is not None
    assert list(plan.replaced) == [f"model.layers.{number}.input_layernorm.weight" for number in range(2)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights_take_a_loaded_model(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3", modules_to_save=["lm_head"])
    assert plan_stream(adapter_in(tmp_path), tiny_models.build("gemma3"), Shards(tmp_path / "base")) is None


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


def test_whole_modules_and_biases_of_the_file_come_by_their_plain_names(tmp_path: Path) -> None:
    adapted = saved(tmp_path, "gpt2", target_modules=["c_attn"], bias="smoa_only", modules_to_save=["ln_f"])
    others = adapter_in(tmp_path).others
    names = {f"transformer.h.{layer}.attn.c_attn.bias" for layer in range(2)}
    assert others.keys() == names | {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    trained: nn.Module = adapted.base_model.model.transformer.ln_f.modules_to_save["default"]
    assert torch.equal(others["transformer.ln_f.weight"], trained.weight)
