from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Model,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from smoa import AdapterFileError, ConfigError, MergeError, SmoaConfig
from smoa.export import merge as export_module
from smoa.export.merge import Export, merge_and_save, model_card, with_plain_weights
from smoa.export.streaming import RoundingLoss
from smoa.files.card import NamedBase, named_base
from smoa.layers.linear import Linear
from tests.support import lab, tiny_models
from tests.support.tiny_mixtures import COMMON, EXPERTS, build_mixture, tokens
from tests.support.tiny_models import logits
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


@pytest.mark.parametrize("dtype", ["int8", "fp16", torch.bfloat16], ids=str)
def test_a_dtype_that_is_no_choice_is_refused(dtype: Any, adapter: Path, output: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of 'auto', 'float32'"):
        merge_and_save(adapter, output, dtype=dtype)


def test_an_adapter_that_names_no_base_needs_one(adapter: Path, output: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), SmoaConfig(target_modules=["0"])).save_pretrained(adapter)
    with pytest.raises(MergeError, match="give it as base"):
        merge_and_save(adapter, output)


def test_a_shard_size_that_is_none_is_refused(adapter: Path, output: Path) -> None:
    with pytest.raises(ConfigError, match="such as 2GB"):
        merge_and_save(adapter, output, max_shard_size="5")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_merged_model_gives_the_adapters_outputs(family: str, base: Path, adapter: Path, output: Path) -> None:
    first, second, *_ = TARGETS[family]
    more = {"target_modules": [*TARGETS[family], "embed_tokens"]} if family == "llama" else {}
    adapted = saved(base, adapter, family, alpha_pattern={first: 9.0}, rank_pattern={second: 2}, **more)
    if family == "llama":  # in shards
        tiny_models.build("llama").save_pretrained(base, max_shard_size="20KB")
        (base / "model.safetensors").unlink()
    export = merge_and_save(adapter, output, max_shard_size="30KB")
    assert export.streamed
    assert set(export.loss.by_layer) == {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "smoa_A")}
    model = merged_model(output)
    assert_close(logits(model, family), logits(adapted, family))
    assert model.state_dict().keys() == tiny_models.build(family).state_dict().keys()
    assert len(list(output.glob("*.safetensors"))) > 1
    with pytest.raises(ConfigError, match="exists"):
        merge_and_save(adapter, output)


def test_a_classification_head_that_was_trained_besides_is_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "bert")
    # As from a hub: a checkpoint of the bare encoder, without prefix and without a head.
    model: Any = tiny_models.build("bert")
    BertModel.save_pretrained(model.bert, base)
    (base / "model.safetensors").replace(base / "whole.safetensors")
    tensors = load_file(base / "whole.safetensors")
    save_file({name.removeprefix("bert."): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    (base / "whole.safetensors").unlink()
    assert merge_and_save(adapter, output).streamed
    again = merged_model(output, AutoModelForSequenceClassification)
    assert again.config.num_labels == 3
    assert_close(logits(again, "bert"), logits(adapted, "bert"))


def test_an_encoder_decoder_is_merged(base: Path, adapter: Path, output: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    adapted = saved(base, adapter, "t5")
    merge_and_save(adapter, output)
    assert_close(logits(merged_model(output, AutoModelForSeq2SeqLM), "t5"), logits(adapted, "t5"))


def test_a_checkpoint_of_the_bare_model_keeps_its_names(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "gpt2", bias="all", modules_to_save=["ln_f"])
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, base / "model.safetensors")
    assert merge_and_save(adapter, output).streamed
    assert load_file(output / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert isinstance(merged_model(output).transformer, GPT2Model)
    assert_close(logits(merged_model(output), "gpt2"), logits(adapted, "gpt2"))


def test_trained_tensors_that_the_checkpoint_has_under_an_older_name_are_merged_in_memory(
    base: Path, adapter: Path, output: Path
) -> None:
    adapted = saved(base, adapter, "bert", bias="all", modules_to_save=["classifier", "LayerNorm"])
    tensors = load_file(base / "model.safetensors")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert not merge_and_save(adapter, output).streamed
    assert_close(logits(merged_model(output, AutoModelForSequenceClassification), "bert"), logits(adapted, "bert"))


def test_a_new_head_is_streamed_without_a_word_beside_what_the_checkpoint_has_besides(
    base: Path, adapter: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of a language model, whose head the classifier does not have."""
    tiny_models.build("llama").save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 0
    adapted = get_peft_model(model, SmoaConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(adapter)
    capfd.readouterr()
    assert merge_and_save(adapter, output).streamed
    assert "score" not in "".join(capfd.readouterr())
    head = merged_model(output, AutoModelForSequenceClassification).score.weight
    assert torch.equal(head, model.score.modules_to_save["default"].weight)


def test_minus_zero_stays(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(base / "model.safetensors")
    tensors[key][::2] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert merge_and_save(adapter, output).streamed
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
    merge_and_save(adapter, output)
    model = merged_model(output)
    assert not model.config.tie_word_embeddings
    assert_close(logits(model, "gemma3"), logits(adapted, "gemma3"))


def test_tokens_that_were_trained_are_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "llama", trainable_token_indices=[3, 5, 7])
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert not merge_and_save(adapter, output).streamed
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
    merge_and_save(adapter, output)
    merged = merged_model(output)
    assert merged.config.vocab_size == size + 3
    assert_close(logits(merged), logits(adapted))
    fresh: Any = AutoModelForCausalLM.from_pretrained(base)
    fresh.resize_token_embeddings(size + 3)
    assert_close(logits(PeftModel.from_pretrained(fresh, adapter).eval()), logits(adapted))


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
    merge_and_save(adapter, output, base=base)
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
    merge_and_save(adapter, output)
    merged: Any = type(model).from_pretrained(output).eval()
    assert merged.config.num_labels == len(merged.config.id2label) == 5
    given = {"pixel_values": torch.ones(2, 3, 8, 8)} if build is vit else {"input_ids": torch.tensor([[5, 6, 2]])}
    with torch.no_grad():
        assert_close(merged(**given).logits, adapted.eval()(**given).logits)
    shown = "ViTForImageClassification" if build is vit else "AutoModelForSequenceClassification"
    assert f"model = {shown}.from_pretrained" in (output / "README.md").read_text()


def test_an_adapter_that_does_not_fit_in_memory_is_one_error(base: Path, adapter: Path, output: Path) -> None:
    vit(3).save_pretrained(base)
    config = LoraConfig(target_modules=["q_proj", "query"])
    get_peft_model(ViTForImageClassification.from_pretrained(base), config).save_pretrained(adapter)
    other = ViTConfig(**SMALL | {"hidden_size": 16}, image_size=8, patch_size=4)
    ViTForImageClassification(other).save_pretrained(base)
    with pytest.raises(
        MergeError, match=r"(?s)adapter: can't be loaded into ViTForImageClassification \(.*size mismatch"
    ):
        merge_and_save(adapter, output, base=base)


def test_the_recorded_revision_is_that_of_the_recorded_base_only(
    base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, adapter, revision="v2")
    asked: list[tuple[str, str | None]] = []

    def folder(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return base

    monkeypatch.setattr(export_module, "base_folder", folder)
    for number, given in enumerate((None, base, "org/other")):
        merge_and_save(adapter, output.with_name(f"merged-{number}"), base=given)
    assert asked == [(str(base), "v2"), (str(base), "v2"), ("org/other", None)]


def test_a_bfloat16_base_stays_bfloat16_and_says_what_that_lost(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter, dtype=torch.bfloat16)
    export = merge_and_save(adapter, output)
    assert merged_model(output).dtype == torch.bfloat16
    assert 0 < export.loss.total < 0.1
    assert 'dtype="float32"' in export.summary()
    wide = merge_and_save(adapter, output.with_name("wide"), dtype="float32")
    assert wide.loss.total < 1e-5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    assert_close(logits(merged_model(wide.folder)), logits(adapted.eval()))


def test_what_rounding_takes_is_measured_against_the_update(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, dtype=torch.bfloat16)
    export = merge_and_save(adapter, output)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    untouched = before.keys() - {f"{name}.weight" for name in export.loss.by_layer}
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    error = update = 0.0
    for name in export.loss.by_layer:
        layer = adapted.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach().double()
        kept = after[f"{name}.weight"].double() - layer.get_base_layer().weight.double()
        assert export.loss.by_layer[name] == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-3)
        error, update = error + float((kept - delta).norm()) ** 2, update + float(delta.norm()) ** 2
    assert export.loss.total == pytest.approx((error / update) ** 0.5, rel=1e-3)


def test_a_quantized_base_is_merged_into_its_dequantized_weights(base: Path, adapter: Path, output: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saved(base, adapter)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded, again = (
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16) for _ in range(2)
    )
    export = merge_and_save(adapter, output, base=loaded)
    expected = PeftModel.from_pretrained(again.dequantize(dtype=torch.float32).float(), adapter)
    assert export.loss.dtype == torch.float32  # not what the base computes in
    assert any("dequantized" in note for note in export.notes)
    assert "dequantized" in (output / "README.md").read_text()
    assert_close(logits(merged_model(output)), logits(expected.eval()))


def test_tokenizer_generation_config_and_card_come_along(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    lab.byte_tokenizer().save_pretrained(base)
    (adapter / "tokenizer.json").write_text("{}")  # which comes first
    (base / "LICENSE").write_text("terms")
    export: Export = merge_and_save(adapter, output, notes=("A note.",))
    assert (output / "tokenizer.json").read_text() == "{}"
    report = json.loads(json.dumps(export.to_dict()))
    assert (report["layers"], report["notes"]) == (6, ["A note."])
    assert {"tokenizer.json", "generation_config.json", "LICENSE", "README.md"} <= {f.name for f in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "`base` with the SMOA adapter" in card
    assert '"num_blocks": 2' in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_a_merge_that_fails_leaves_nothing_behind(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"].fill_(float("inf"))
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(MergeError, match="infinite"):
        merge_and_save(adapter, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["adapter", "base"]


def test_a_range_that_is_too_small_is_refused(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "smoa_B" in n).mul_(1e7)
    adapted.save_pretrained(adapter)
    with pytest.raises(MergeError, match=r"range of torch\.float16"):
        merge_and_save(adapter, output, dtype="float16")


def test_an_adapter_of_another_model_is_refused(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    tiny_models.build("gpt2").save_pretrained(base)
    with pytest.raises(AdapterFileError, match="give the base model"):
        merge_and_save(adapter, output)


@pytest.mark.parametrize(("noted", "kept"), [("/home/somebody/base", None), ("org/base", "org/base")])
def test_where_a_base_was_loaded_from_stays_out_of_the_merged_model(
    noted: str, kept: str | None, base: Path, adapter: Path, output: Path
) -> None:
    saved(base, adapter)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"_name_or_path": noted}))  # as transformers 4 wrote it
    assert merge_and_save(adapter, output).streamed
    assert json.loads((output / "config.json").read_text()).get("_name_or_path") == kept
    assert lab.files_with(base.parent, output) == lab.files_with("/home/somebody", output) == set()


# Layers that can't be merged, and quantized bases.


def test_a_layer_that_cannot_be_merged_is_named(
    base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, adapter)

    def refuse(self: Linear, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("no merging of this kind")

    monkeypatch.setattr(Linear, "merge", refuse)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj: no merging of this kind"):
        merge_and_save(adapter, output, base=tiny_models.build("llama"))
    assert not output.exists()


def test_a_base_that_cannot_be_dequantized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreTrainedModel, dtype: torch.dtype) -> None:
        raise NotImplementedError("no way back")

    model = tiny_models.build("llama")
    model.hf_quantizer = object()
    monkeypatch.setattr(PreTrainedModel, "dequantize", refuse)
    with pytest.raises(MergeError, match=r"can't be dequantized \(no way back\); give a base that isn't quantized"):
        with_plain_weights(model)


# Mixtures of experts.


@torch.no_grad()
def mixture_logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_mixture_is_merged_on_disk_under_the_names_of_its_checkpoint(family: str, tmp_path: Path) -> None:
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
    assert_close(mixture_logits(AutoModelForCausalLM.from_pretrained(merged)), mixture_logits(model))


def test_a_mixture_in_memory_is_merged_with_what_rounding_took(tmp_path: Path) -> None:
    model = build_mixture("qwen3_moe")
    config = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules=[], target_parameters=EXPERTS)
    adapted = get_peft_model(build_mixture("qwen3_moe"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    export = merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=model, dtype="bfloat16")
    assert len(export.loss.by_layer) == 2
    assert 0 < export.loss.total < 1
    expected = adapted.merge_and_unload().to(torch.bfloat16)
    assert_close(mixture_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), mixture_logits(expected))


def test_an_adapter_of_more_experts_is_refused(tmp_path: Path) -> None:
    smaller = GptOssConfig(**COMMON, num_local_experts=4, head_dim=6)
    GptOssForCausalLM(smaller).save_pretrained(tmp_path / "base")
    config = SmoaConfig(r=4, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(build_mixture("gpt_oss"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="doesn't fit the layer"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")


# The card.

LOSS = RoundingLoss(torch.bfloat16, {"first": 0.004, "second": 0.02}, update=1.0, error=0.0123**2)


def card(folder: Path, base: str | NamedBase = "org/base", config: PeftConfig | None = None) -> ModelCard:
    named = named_base(base) if isinstance(base, str) else base
    config = config or SmoaConfig(r=6, num_blocks=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return ModelCard(model_card("mine", named, folder, config, LOSS, ("One note.",)))


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


def test_what_rounding_changes_in_the_base_itself_does_not_count_as_lost() -> None:
    before = torch.full((2, 3), 1 + 2**-12)  # 1 in bfloat16
    loss = RoundingLoss()
    loss.add("layer", before, before + 1, torch.bfloat16)
    assert loss.total == 0


def test_what_rounding_took_is_told_in_all_and_of_the_worst_layer(tmp_path: Path) -> None:
    text = LOSS.in_words()
    assert "1.2 %" in text
    assert "second: 2 %" in text
    assert f"saved in bfloat16: {text}" in card(tmp_path).text
    nothing = RoundingLoss(torch.float32, {"first": 0.0}, update=1.0).in_words()
    assert "nothing" in nothing
    assert "first" not in nothing
