"""Where a base model lies and which class it is: folders, hub ids, adapters with and without a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from smoa import ConfigError, MergeError, SmoaConfig
from smoa.export import base_checkpoint
from smoa.export.base_checkpoint import BaseCheckpoint, adapter_config, base_folder, class_name
from smoa.files.names import embeddings_of
from tests.support import tiny_models


def checkpoint(tmp_path: Path, family: str = "llama", targets: tuple[str, ...] = ("q_proj",), **config: Any) -> Any:
    """A saved base of the family, seen by an adapter of that config."""
    model = tiny_models.build(family)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_modules=list(targets), **config))
    adapted.save_pretrained(tmp_path / "adapter")
    return BaseCheckpoint(tmp_path / "base", tmp_path / "adapter", adapter_config(tmp_path / "adapter"))


def test_a_folder_is_its_own_place(tmp_path: Path) -> None:
    assert base_folder(str(tmp_path)) == tmp_path


def test_of_a_hub_id_the_revision_is_fetched_without_weights_of_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(base_checkpoint, "snapshot_download", download)
    assert base_folder("owner/model", revision="v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")
    assert {"config.json", "*.safetensors", "tokenizer*", "LICENSE*"} <= set(asked["allow_patterns"])
    assert not {"*.bin", "*.pt", "*.gguf", "*"} & set(asked["allow_patterns"])


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("no route to host")])
def test_what_is_neither_a_folder_nor_on_the_hub_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(base_checkpoint, "snapshot_download", fail)
    with pytest.raises(
        MergeError, match="base model 'owner/model': is not a local folder and could not be downloaded from the Hub"
    ):
        base_folder("owner/model")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder that save_pretrained wrote"):
        adapter_config(tmp_path)


def test_the_config_of_another_method_is_read_as_it_is(tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = adapter_config(tmp_path)
    assert isinstance(config, LoraConfig)
    assert config.r == 3


def test_an_adapter_without_a_task_is_of_the_class_that_peft_noted(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    assert base.peft_config.task_type is None
    assert type(base.on_meta()) is type(base.load()) is LlamaForCausalLM


def test_an_adapter_that_notes_nothing_is_of_the_bare_model(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    base.peft_config.auto_mapping = None
    assert class_name(base.peft_config) == "AutoModel"
    assert type(base.on_meta()) is LlamaModel


def test_on_the_meta_device_every_parameter_has_its_shape_and_no_memory(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, task_type="CAUSAL_LM")
    model = base.on_meta()
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in tiny_models.build("llama").state_dict().items()}


def test_the_labels_are_counted_in_the_adapters_head(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "bert", ("query",), task_type="SEQ_CLS")
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    for key in ("id2label", "label2id"):
        raw.pop(key, None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    assert base.model_config().num_labels == 3
    assert len(base.on_meta().classifier.weight) == 3


def test_without_a_head_of_its_own_the_bases_labels_count(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "bert", ("query",), task_type="SEQ_CLS")
    without = BaseCheckpoint(base.folder, checkpoint(tmp_path / "other").adapter, base.peft_config)
    assert without.model_config().num_labels == 3


def test_a_model_that_names_no_embeddings_has_none() -> None:
    class Speech(nn.Linear):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError  # as transformers' models of speech do

    assert embeddings_of(Speech(2, 2)) == {}
