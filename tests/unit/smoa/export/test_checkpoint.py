"""A base model's folder and class, and its files, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from smoa import AdapterFileError, ConfigError, MergeError, SmoaConfig
from smoa.export import checkpoint as module
from smoa.export.checkpoint import INDEX, BaseCheckpoint, Shards, adapter_config, base_folder, write_checkpoint
from smoa.export.merge import merge_and_save
from smoa.export.streaming import RoundingLoss, SavedAdapter, plan_stream
from smoa.files.names import embeddings_of
from tests.support import tiny_models
from tests.support.adapter_files import rewritten

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "plain": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "narrow": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the tensors in one file."""
    (tmp_path / "source").mkdir()
    save_file(TENSORS, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def read_all(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", ["5GB", 40])
def test_what_is_written_is_what_was_read(
    size: int | str, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)  # larger tensors are written in pieces
    checkpoint = Shards(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, size)
    found = read_all(target)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())
    assert (target / INDEX).is_file() == (size == 40)
    again = Shards(target)
    assert {key: (e.dtype, e.shape) for key, e in again.entries.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in TENSORS.items()
    }
    assert all(torch.equal(again.read(key), tensor) for key, tensor in TENSORS.items())


def test_every_tensor_is_aligned_and_says_who_can_read_it(source: Path, target: Path) -> None:
    checkpoint = Shards(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, "5GB")
    with safe_open(target / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    raw = (target / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for key, entry in checkpoint.entries.items():
        assert header[key]["data_offsets"][0] % entry.itemsize == 0


def test_an_index_that_names_a_missing_file_is_refused(source: Path, target: Path) -> None:
    checkpoint = Shards(source)
    write_checkpoint(target, checkpoint.entries, checkpoint.read, 40)
    lost = next(target.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(MergeError, match=f"names {lost.name}, which is missing; download the checkpoint again"):
        Shards(target)


# The folder, the config and the class of the base.


def without(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:100])


def empty_index(base: Path) -> None:
    (base / INDEX).write_text("{}")


@pytest.mark.parametrize(
    "spoil",
    [without("config.json"), cut("config.json"), without("model.safetensors"), cut("model.safetensors"), empty_index],
    ids=["no config", "half a config", "no weights", "half of the weights", "no index"],
)
def test_a_base_that_is_not_whole_is_one_error_and_leaves_nothing(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    base = checkpoint(tmp_path)
    spoil(base.folder)
    with pytest.raises(MergeError, match=r"(base|model\.safetensors): the base model can't be read"):
        merge_and_save(base.adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_base_of_a_class_that_transformers_lacks_is_one_error(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    base.peft_config.auto_mapping["base_model_class"] = "NewerForCausalLM"
    with pytest.raises(MergeError, match=r"NewerForCausalLM, which transformers .* lacks"):
        base.load()


def checkpoint(tmp_path: Path, family: str = "llama", targets: tuple[str, ...] = ("q_proj",), **config: Any) -> Any:
    """A saved base of the family, seen by an adapter of that config."""
    model = tiny_models.build(family)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_modules=list(targets), **config))
    adapted.save_pretrained(tmp_path / "adapter")
    return BaseCheckpoint(tmp_path / "base", tmp_path / "adapter", adapter_config(tmp_path / "adapter"))


def test_of_a_hub_id_the_revision_is_fetched_without_weights_of_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert base_folder("owner/model", revision="v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")
    assert {"config.json", "*.safetensors", "tokenizer*", "LICENSE*"} <= set(asked["allow_patterns"])
    assert not {"*.bin", "*.pt", "*.gguf", "*"} & set(asked["allow_patterns"])


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("no route to host")])
def test_what_is_neither_a_folder_nor_on_the_hub_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(
        MergeError, match="base model 'owner/model': is not a local folder and could not be downloaded from the Hub"
    ):
        base_folder("owner/model")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder that save_pretrained wrote"):
        adapter_config(tmp_path)


def test_an_adapter_without_a_task_is_of_the_class_that_peft_noted(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    assert base.peft_config.task_type is None
    assert type(base.on_meta()) is type(base.load()) is LlamaForCausalLM


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


# which merges go from disk to disk


STREAMED = ["q_proj", "down_proj"]


def saved_both(folder: Path, family: str = "llama", **config: Any) -> PeftModel:
    """Base and adapter in `folder`; the adapted model."""
    model = tiny_models.build(family)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    options = {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": STREAMED} | config
    adapted = get_peft_model(model, SmoaConfig(**options, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def adapter_in(folder: Path) -> SavedAdapter:
    config = adapter_config(folder / "adapter")
    assert isinstance(config, SmoaConfig)
    return SavedAdapter(folder / "adapter", config)


@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 3)], ids=["lacks", "has in another shape"])
def test_a_weight_that_the_checkpoint_lacks_takes_a_loaded_model(tensor: Tensor | None, tmp_path: Path) -> None:
    saved_both(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    if tensor is not None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensor
    save_file(tensors, file)
    assert plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base")) is None


def test_layers_that_the_model_does_not_have_are_told(tmp_path: Path) -> None:
    saved_both(tmp_path)
    with pytest.raises(AdapterFileError, match=r"the adapter is for .* and 3 more that BertForSequenceClassification"):
        plan_stream(adapter_in(tmp_path), tiny_models.build("bert"), Shards(tmp_path / "base"))


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("B.weight", None, "lacks model.layers.1.self_attn.q_proj.smoa_B.weight"),
        ("A.weight", torch.tensor(1.0), r"smoa_A.weight: shape \(\) doesn't fit"),
        ("A.weight", torch.ones(4, 16, dtype=torch.int32), "smoa_A.weight: torch.int32 found"),
        ("block_scale", torch.ones(5), r"smoa_block_scale: shape \(5,\) doesn't fit"),
        ("C.weight", torch.ones(1), "has .*smoa_C.weight.*, expected"),
    ],
    ids=["a part is missing", "no dimensions", "integers", "more scales", "a part that none has"],
)
def test_a_damaged_layer_is_told_before_anything_is_merged(
    tmp_path: Path, part: str, tensor: Tensor | None, reason: str
) -> None:
    saved_both(tmp_path)
    name = f"base_model.model.model.layers.1.self_attn.q_proj.smoa_{part}"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        tensors.update({} if tensor is None else {name: tensor})

    rewritten(tmp_path / "adapter", damage)
    with pytest.raises(AdapterFileError, match=reason):
        plan_stream(adapter_in(tmp_path), tiny_models.build("llama"), Shards(tmp_path / "base"))


def test_where_nothing_changes_nothing_is_lost() -> None:
    loss = RoundingLoss()
    assert loss.total == 0
    loss.add("same", torch.full((2, 2), 1.003), torch.full((2, 2), 1.003), torch.bfloat16)
    assert (loss.total, loss.by_layer) == (0.0, {"same": 0.0})
