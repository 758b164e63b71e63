"""Faults that were found by reading the code of a9f43f17 (L1 to L24), each through public calls and saved tensors. They
fail there. tests/states looks for the next."""

import copy
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from smoa import (
    AdapterFileError,
    ConfigError,
    MergeError,
    PartitionError,
    SmoaConfig,
    SmoaError,
    UnsupportedModuleError,
)
from smoa.files.loading import MEANING
from smoa.hotswap import hotswap_adapter
from tests.support import golden
from tests.support.layers import Wrapper, smoa_layers, stored_bits
from tests.support.tiny_mixtures import build_mixture, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in a/base:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]
TIED = Path(__file__).parents[2] / "golden" / "adapters" / "tied"
X = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(5))


def llama(tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    with torch.random.fork_rng():  # so that factors differ from adapter to adapter
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tie)).to(dtype).eval()


def config(**settings: Any) -> SmoaConfig:
    given = {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return SmoaConfig(**{**given, **settings})


def out(model: nn.Module, x: Tensor = X, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Any = model(x, **kwargs)
    return found.logits.clone() if hasattr(found, "logits") else found.clone()


# Weights that merging touches.


def test_unmerging_restores_both_ends_of_a_tied_adapter_also_where_they_share_no_memory() -> None:  # L1
    model = PeftModel.from_pretrained(golden.base("gemma3"), TIED).eval()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    before, state = out(model), stored_bits(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(out(model), before)
    assert stored_bits(model) == state


def test_both_ends_of_a_weight_that_another_module_uses_are_merged_into_weights_of_their_own() -> None:
    model = PeftModel.from_pretrained(golden.base("gemma3"), TIED).eval()
    third = model.base_model.model.third = nn.Linear(1, 1, bias=False)
    third.weight = model.get_input_embeddings().get_base_layer().weight
    before, held = out(model), third.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(out(model), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(third.weight, held)
    model.unmerge_adapter()
    assert torch.equal(out(model), before)


def test_a_failed_merge_of_one_end_leaves_each_end_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:  # L1
    model = PeftModel.from_pretrained(golden.base("gemma3"), TIED).eval()
    before, layers = out(model), list(smoa_layers(model).values())
    copy_, calls = torch.Tensor.copy_, []

    def fails(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.data_ptr() == layers[-1].stored_weight().data_ptr() and not calls:
            calls.append(1)
            raise MemoryError("none left")
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", fails)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    monkeypatch.undo()
    torch.testing.assert_close(out(model), before, rtol=1e-4, atol=1e-4)
    if any(layer.merged for layer in layers):
        model.unmerge_adapter()
    assert torch.equal(out(model), before)


def test_a_merge_into_a_parameter_of_a_tied_head_leaves_the_embedding_alone() -> None:  # L4
    model = get_peft_model(llama(tie=True), config(target_modules=[], target_parameters=["lm_head.weight"])).eval()
    before = out(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(out(model), before)


@pytest.mark.parametrize("targets", [{}, {"target_modules": [], "target_parameters": ["q_proj.weight"]}])
def test_a_layer_that_another_method_adapts_is_refused(targets: dict[str, Any]) -> None:  # L5
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = inject_adapter_in_model(lora, llama(), "lora").eval()
    before = stored_bits(model)
    with pytest.raises(SmoaError, match=r"q_proj: a peft\.tuners\.lora.* adapts it.*merge_and_unload"):
        get_peft_model(model, config(**targets))
    assert before.keys() == model.state_dict().keys()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x))))


def test_a_module_at_two_places_is_refused_before_anything_is_adapted() -> None:  # L6
    for targets in ({"target_modules": ["a"]}, {"target_modules": ["c"], "target_parameters": ["a.weight"]}):
        base = Twice()
        with pytest.raises(UnsupportedModuleError, match=r"a: is one module at a, b"):
            get_peft_model(base, config(**targets))
        assert type(base.a) is type(base.c) is nn.Linear
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    t5.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(UnsupportedModuleError, match=r"shared: is one module at"):
        get_peft_model(t5, config(target_modules=["shared"]))


def test_a_merge_that_loses_nothing_says_nothing() -> None:
    model = get_peft_model(llama(dtype=torch.bfloat16), config()).eval()
    for layer in smoa_layers(model).values():
        layer.smoa_B["default"].weight.data *= 5
    model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_safe_merge_of_an_adapter_of_some_layers_passes_the_others_over() -> None:  # found by tests/states
    model = get_peft_model(llama(), config(target_modules=["q_proj"])).eval()
    model.add_adapter("other", config(target_modules=["v_proj"]))
    model.merge_adapter(adapter_names=["other"], safe_merge=True)
    model.unmerge_adapter()


# Loading.


OTHERS: dict[str, Any] = {
    "r": 8,
    "alpha": 64.0,
    "modulation": "none",
    "num_blocks": 4,
    "num_blocks_pattern": {"q_proj": 4},
    "use_rslora": True,
    "rank_pattern": {"q_proj": 6},
    "alpha_pattern": {"q_proj": 6.0},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "bias": "smoa_only",
}


@pytest.mark.parametrize("other", [{key: value} for key, value in OTHERS.items()])
def test_a_load_over_a_name_compares_settings(tmp_path: Path, other: dict[str, Any]) -> None:  # L2
    assert {*OTHERS} == {*MEANING} - {"ensure_weight_tying"}  # of which no new adapter can be made
    get_peft_model(llama(), config(**other)).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).eval()
    before = stored_bits(model)
    with pytest.raises(ConfigError, match=rf"{next(iter(other))}=.* as the loaded 'default'"):
        model.load_adapter(tmp_path, "default")
    assert stored_bits(model) == before


def test_a_trained_module_of_another_shape_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    def model(labels: int) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=labels, pad_token_id=0, **sizes))

    saved = get_peft_model(model(3), config(task_type="SEQ_CLS", init_weights=False))
    saved.base_model.model.model.embed_tokens.weight.data *= 2
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded, base = get_peft_model(model(2), config(task_type="SEQ_CLS")), model(2)
    before = stored_bits(loaded), stored_bits(base)
    with pytest.raises(AdapterFileError, match=r"score.*: shape \(3, 16\), not the model's \(2, 16\)"):
        loaded.load_adapter(tmp_path, "default")
    with pytest.raises(AdapterFileError, match="ignore_mismatched_sizes=True"):
        PeftModel.from_pretrained(base, tmp_path)
    assert (stored_bits(loaded), stored_bits(base)) == before
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        again = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    own, theirs = (smoa_layers(each)[next(iter(smoa_layers(each)))] for each in (again, saved))
    assert torch.equal(own.smoa_B["default"].weight, theirs.smoa_B["default"].weight)


def test_transformers_own_load_skips_a_trained_module_of_another_shape_if_asked(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="SEQ_CLS"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"num_labels": 2, "ignore_mismatched_sizes": True}
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **settings)
    assert loaded.score.weight.shape[0] == 2
    for name, layer in smoa_layers(model.base_model.model).items():
        assert torch.equal(smoa_layers(loaded)[name].smoa_B["default"].weight, layer.smoa_B["default"].weight)


def test_a_load_over_a_name_of_the_same_settings_replaces_it(tmp_path: Path) -> None:
    other = get_peft_model(llama(), config(alpha=4.0)).eval()  # alpha = r, which None means
    other.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).eval()
    assert not torch.equal(out(model), out(other))
    model.load_adapter(tmp_path, "default")
    assert torch.equal(out(model), out(other))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_base_in_another_dtype_keeps_its_table(tmp_path: Path, low: bool, tie: bool) -> None:  # L8
    narrow = get_peft_model(llama(tie, torch.bfloat16), config(target_modules=["embed_tokens"]))
    narrow.save_pretrained(tmp_path)
    base = llama(tie)
    before = out(base)
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low).eval()
    with model.disable_adapter():
        assert torch.equal(out(model), before)
    embedding = model.get_input_embeddings().get_base_layer()
    assert embedding.weight.dtype == torch.float32
    assert (embedding.weight is model.get_output_embeddings().weight) is tie


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_new_rows_of_a_table_come_from_the_file_in_place(tmp_path: Path, low: bool, tie: bool) -> None:  # L9
    def resized(seed: int) -> Any:
        base = llama(tie)
        torch.manual_seed(seed)
        base.resize_token_embeddings(70, mean_resizing=False)
        return base

    model = get_peft_model(resized(1), config(target_modules=["embed_tokens"])).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(resized(2), tmp_path, low_cpu_mem_usage=low).eval()
    ours, theirs = (each.get_input_embeddings().get_base_layer().weight for each in (loaded, model))
    assert torch.equal(ours, theirs)
    assert (ours is loaded.get_output_embeddings().weight) is tie
    if tie:
        assert torch.equal(out(loaded, X + 6), out(model, X + 6))


def test_a_table_that_was_trained_at_its_old_shape_comes_from_the_file(tmp_path: Path) -> None:  # L8
    base = llama()
    base.get_input_embeddings().weight.data.add_(0.01)
    model = get_peft_model(base, config(target_modules=["embed_tokens"])).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(out(PeftModel.from_pretrained(llama(), tmp_path).eval()), out(model))


def test_a_table_of_a_file_is_not_written_over_a_merged_one(tmp_path: Path) -> None:
    base = llama()
    base.get_input_embeddings().weight.data.add_(0.01)
    get_peft_model(base, config(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config(target_modules=["embed_tokens"])).eval()
    model.add_adapter("second", config(target_modules=["embed_tokens"]))
    before = out(model)
    model.merge_adapter()
    merged = out(model)
    with pytest.raises(AdapterFileError, match="new rows of a merged embedding; call unmerge_adapter first"):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"), "second")
    assert torch.equal(out(model), merged)
    model.unmerge_adapter()
    assert torch.equal(out(model), before)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        (
            {"trainable_token_indices": [1, 2]},
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
        ({"target_modules": ["embed_tokens"]}, "base_model.model.model.embed_tokens.base_layer.weight"),
    ],
)
def test_what_is_saved_beside_factors_and_not_finite_is_refused(tmp_path: Path, more: dict[str, Any], key: str) -> None:
    get_peft_model(llama(), config(**more)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[key].view(-1)[3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    base = llama()
    before = stored_bits(base)
    with pytest.raises(AdapterFileError, match="holds NaN or infinite values; the adapter is broken"):
        PeftModel.from_pretrained(base, tmp_path)
    assert stored_bits(base) == before


def test_an_adapter_is_not_loaded_over_a_merged_one(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).eval()
    before = out(model)
    model.merge_adapter()
    with pytest.raises(MergeError, match="'default' is merged; call unmerge_adapter first"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    assert torch.equal(out(model), before)


def test_low_cpu_mem_usage_keeps_the_factors_bits(tmp_path: Path) -> None:  # L9
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    for key, tensor in model.state_dict().items():
        if ".smoa_A." in key:
            assert torch.equal(tensor, saved[key.replace(".default.", ".")])


@pytest.mark.parametrize("more", [{"bias": "smoa_only"}, {"modules_to_save": ["1"]}])
def test_low_cpu_mem_usage_keeps_the_dtype_of_biases_and_copies(tmp_path: Path, more: dict[str, Any]) -> None:
    def base(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)

    biased = config(target_modules=["0"], **more)
    get_peft_model(base(torch.float64), biased).save_pretrained(tmp_path)  # type: ignore[arg-type]
    model = PeftModel.from_pretrained(base(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert model(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


# The base.


def test_another_base_is_refused_and_can_be_loaded_all_the_same(tmp_path: Path) -> None:  # L12
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    base = llama(seed=1)
    with pytest.raises(AdapterFileError, match=r"trained on another base.*is off by up to \d+%.*other_base=True"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        llama(seed=1).load_adapter(str(tmp_path))
    model = get_peft_model(llama(seed=1), config())
    with pytest.raises(AdapterFileError, match="trained on another base"):
        hotswap_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        model.load_adapter(tmp_path, "other")
    assert [*model.peft_config] == ["default"]
    told = SmoaConfig.from_pretrained(tmp_path)
    told.other_base = True
    PeftModel.from_pretrained(llama(seed=1), tmp_path, config=told).save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(llama(seed=1), tmp_path / "again")
    assert "other_base" not in (tmp_path / "adapter_config.json").read_text()
    assert '"other_base": true' in (tmp_path / "again" / "adapter_config.json").read_text()


def test_a_base_that_peft_has_merged_a_lora_into_since_a_load_is_another_one(tmp_path: Path) -> None:
    get_peft_model(llama(), config(partition="contiguous")).save_pretrained(tmp_path / "before")
    base = PeftModel.from_pretrained(llama(), tmp_path / "before").unload()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = get_peft_model(base, lora).merge_and_unload()  # writes through `.data`
    trained = get_peft_model(copy.deepcopy(merged), config(partition="contiguous"))
    trained.save_pretrained(tmp_path / "after")
    with pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(merged, tmp_path / "before")
    assert torch.equal(out(PeftModel.from_pretrained(merged, tmp_path / "after")), out(trained))


def test_an_adapter_of_a_quantized_base_is_held_to_what_quantizing_changes(tmp_path: Path) -> None:
    made = get_peft_model(llama(), config())
    made.peft_config["default"].quantized_base = True
    made.save_pretrained(tmp_path)
    for change, taken in ((1.15, True), (1.4, False)):
        base = llama()
        for parameter in base.parameters():
            parameter.data *= change
        with nullcontext() if taken else pytest.raises(AdapterFileError, match="trained on another base"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("saved", ["here", "another base", "lacks a tensor"])
def test_a_refused_load_leaves_nothing_in_the_base(tmp_path: Path, saved: str) -> None:
    trained = get_peft_model(llama(seed=int(saved == "another base")), config(modules_to_save=["lm_head"], bias="all"))
    trained.save_pretrained(tmp_path)
    if saved == "lacks a tensor":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        del tensors[next(key for key in tensors if ".smoa_A." in key)]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    for load in (lambda base: PeftModel.from_pretrained(base, tmp_path), lambda base: base.load_adapter(str(tmp_path))):
        base = llama()
        known = [(name, type(module), {*vars(module)}) for name, module in base.named_modules()]
        trains, state = [parameter.requires_grad for parameter in base.parameters()], stored_bits(base)
        if saved == "here":
            load(base)
            continue
        with pytest.raises(AdapterFileError):
            load(base)
        assert [(name, type(module), {*vars(module)}) for name, module in base.named_modules()] == known
        assert [parameter.requires_grad for parameter in base.parameters()] == trains
        assert stored_bits(base) == state
        get_peft_model(base, config())


@pytest.mark.parametrize("besides", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_a_refused_second_load_leaves_the_first_adapter_as_it_was(tmp_path: Path, besides: dict[str, Any]) -> None:
    get_peft_model(llama(), config(init_weights=False, **besides)).save_pretrained(tmp_path / "good")
    get_peft_model(llama(seed=1), config(init_weights=False, **besides)).save_pretrained(tmp_path / "bad")
    get_peft_model(llama(), config(init_weights=False)).save_pretrained(tmp_path / "plain")
    ids = torch.arange(6)[None]
    for of_peft in (True, False):
        base = llama()
        if of_peft:
            model: Any = PeftModel.from_pretrained(base, tmp_path / "good", is_trainable=True)
        else:
            model = base
            model.load_adapter(str(tmp_path / "good"))
        expected, state = model(ids).logits, stored_bits(base)
        trains = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        with pytest.raises(AdapterFileError, match="trained on another base"):
            model.load_adapter(str(tmp_path / "bad"), "two")
        assert [*model.peft_config] == ["default"]
        assert torch.equal(model(ids).logits, expected)
        assert stored_bits(base) == state
        assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == trains
        # PEFT looks for new tokens in the file of every adapter, LoRA's too
        model.load_adapter(str(tmp_path / ("good" if "trainable_token_indices" in besides else "plain")), "two")


def test_each_adapter_that_is_made_on_a_quantized_base_says_so_and_no_other() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed, one = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False)).to("cpu"), config(target_modules=["0"])
    model = get_peft_model(packed, one)
    model.add_adapter("second", config(target_modules=["0"]))
    assert [each.quantized_base for each in model.peft_config.values()] == [True, True]
    get_peft_model(nn.Sequential(nn.Linear(64, 64)), one)
    assert not one.quantized_base


def test_the_gradient_of_experts_weights_has_both_parts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 16, 12, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([nn.functional.linear(own, self.w[number]) for number, own in enumerate(x.chunk(3))])

    adapter = config(target_modules=[], target_parameters=["experts.w"], init_weights=False)
    experts = inject_adapter_in_model(adapter, nn.ModuleDict({"experts": Experts()}))["experts"].double()
    weight, x = experts.get_base_layer().w, torch.randn(9, 12, dtype=torch.float64)
    change = 1 + experts.delta("default").reshape(weight.shape).detach() / weight.detach()  # ΔW is linear in W

    def whole(w: Tensor) -> Tensor:
        return torch.cat([own @ each.T for own, each in zip(x.chunk(3), w * change, strict=True)]).square().sum()

    expected = torch.func.grad(whole)(weight.detach())
    weight.requires_grad_(True)
    found = torch.autograd.grad(experts(x).square().sum(), weight)[0]
    torch.testing.assert_close(found, expected)


def changed(name: str, factor: float, make: Callable[[], Any]) -> Any:
    base = make()
    base.get_parameter(name).data *= factor
    return base


def narrow() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


DOWN, VALUE = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
mixture = partial(build_mixture, "qwen3_moe")
BASES: dict[str, tuple[dict[str, Any], Callable[[], Any], bool]] = {
    "the same in 16 bits": ({}, lambda: llama(dtype=torch.bfloat16), True),
    "another, without modulation": ({"modulation": "none"}, lambda: llama(seed=1), True),
    "another, relative to it": ({"scale": "paper"}, lambda: llama(seed=1), True),
    "one changed layer": ({}, lambda: changed(DOWN, 0.5, llama), False),
    "one changed layer, by block": ({"scale": "block"}, lambda: changed(VALUE, 0.5, llama), False),
    "one changed layer, by layer": ({"scale": "layer"}, lambda: changed(DOWN, 0.5, llama), False),
    "the same experts": (EXPERTS, mixture, True),
    "changed experts": (EXPERTS, lambda: changed("model.layers.0.mlp.experts.down_proj", 2, mixture), False),
    "other shapes": ({}, narrow, False),
}


@pytest.mark.parametrize("case", BASES)
def test_another_base_is_seen_where_the_update_depends_on_it(tmp_path: Path, case: str) -> None:  # L12, L21
    settings, base, fits = BASES[case]
    get_peft_model(mixture() if settings is EXPERTS else llama(), config(**settings)).save_pretrained(tmp_path)
    with nullcontext() if fits else pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_base_that_is_a_little_other_warns_by_names(tmp_path: Path) -> None:  # L12
    base = llama()
    base.config._name_or_path = base.name_or_path = "a/base"
    get_peft_model(base, config()).save_pretrained(tmp_path)
    for name, factor, warns in (("a/base", 1.004, False), ("a/tuned", 1.004, True), ("a/base", 1.02, True)):
        tuned = llama()
        tuned.config._name_or_path = tuned.name_or_path = name
        for layer in tuned.model.layers:
            layer.mlp.down_proj.weight.data *= factor
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(tuned, tmp_path)
        found = [str(warning.message) for warning in seen if "not quite the same" in str(warning.message)]
        assert bool(found) is warns, (name, factor, found)


# Names.


@pytest.mark.parametrize(
    "names",
    [
        ("0", "1"),
        ("mlp", "weight"),
        ("self_attn", "q_proj"),
        ("model", "layers"),
        ("weight", "smoa_c"),
        ("smoa_A", "weight"),
        ("modules_to_save", "down_proj"),
    ],
)
def test_adapters_named_like_parts_of_paths_are_saved_whole(tmp_path: Path, names: tuple[str, str]) -> None:  # L13
    model = get_peft_model(llama(), config(), adapter_name=names[0])
    model.add_adapter(names[1], config())
    model.eval().save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=names[1]).eval()
        assert torch.equal(out(loaded), out(model))


def test_copies_and_biases_of_such_names_are_saved_whole(tmp_path: Path) -> None:  # L13
    base = nn.ModuleDict({"layer": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    base.forward = lambda x: base["head"](base["layer"](x))  # type: ignore[method-assign]
    settings = {"target_modules": ["layer"], "modules_to_save": ["head"], "bias": "smoa_only"}
    model = get_peft_model(copy.deepcopy(base), config(**settings), adapter_name="layer")
    model.add_adapter("base_layer", config(target_modules=["layer"], modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    for name in ("layer", "base_layer"):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert "base_model.model.head.weight" in saved
        assert ("base_model.model.layer.base_layer.bias" in saved) is (name == "layer")


def test_a_state_dict_that_lacks_tensors_is_not_saved(tmp_path: Path) -> None:  # L13
    model = get_peft_model(llama(), config())
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    with pytest.raises(AdapterFileError, match=r"lacks 15 tensor\(s\) of the adapter"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_compiled_region_is_saved_and_loaded_by_plain_names(tmp_path: Path) -> None:  # L14
    model = get_peft_model(llama(), config(bias="none")).eval()
    layers = model.base_model.model.model.layers
    for number in range(2):
        layers[number] = torch.compile(layers[number])
    plain = {key.replace("_orig_mod.", ""): tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain", state_dict=plain)  # as torch.distributed.checkpoint names them
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("_orig_mod" in key for key in found)
    assert found.keys() == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    with torch.compiler.set_stance("force_eager"):
        expected = out(model)
        assert torch.equal(out(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        assert torch.equal(out(model), expected)
        for layer in smoa_layers(model).values():
            layer.smoa_B["again"].weight.data.zero_()
        assert not torch.equal(out(model), expected)
        hotswap_adapter(model, tmp_path, "again")
        assert torch.equal(out(model), expected)
        base = llama()
        for number in range(2):
            base.model.layers[number] = torch.compile(base.model.layers[number])
        assert torch.equal(out(PeftModel.from_pretrained(base, tmp_path).eval()), expected)


def test_biases_in_a_compiled_region_are_saved_by_plain_names(tmp_path: Path) -> None:  # L14
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(target_modules=["0"], bias="all"))
    model.base_model.model[1] = torch.compile(model.base_model.model[1])
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {name for name in names if name.endswith("bias")} == {
        "base_model.model.0.base_layer.bias",
        "base_model.model.1.bias",
    }


def test_a_model_of_regions_that_accelerate_compiles_is_saved(tmp_path: Path) -> None:  # L14
    utils = pytest.importorskip("accelerate.utils")
    model = get_peft_model(llama(), config(target_modules=["q_proj", "embed_tokens", "lm_head"])).eval()
    with torch.compiler.set_stance("force_eager"):
        expected = out(model)
        utils.compile_regions(model).save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)


def test_an_adapter_whose_name_begins_anothers_is_saved_without_its_layers(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="math")
    model.add_adapter("math-2", config(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    for name, target in {"math": "q_proj", "math-2": "v_proj"}.items():
        assert all(target in key for key in load_file(tmp_path / name / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["smoa_c", "smoa_A", "smoa_block_scale", "bias", "trainable_tokens_delta"])
@pytest.mark.parametrize("copies", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_an_adapter_named_like_a_part_of_the_method_keeps_its_copies(  # L15
    tmp_path: Path, copies: dict[str, Any], name: str
) -> None:
    model = get_peft_model(llama(), config(bias="all", **copies), adapter_name=name).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in key.removesuffix(name):
            parameter.data.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(out(loaded), out(model))


# Calls.


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.line = nn.Embedding(64, 6), nn.Conv1d(6, 8, 3, padding=1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.line(self.table(x).mT)


@pytest.mark.parametrize("target", ["table", "line"])
def test_dropout_does_not_act_in_evaluation(target: str) -> None:  # L3
    torch.manual_seed(0)
    model = get_peft_model(Convolved().eval(), config(target_modules=[target], smoa_dropout=0.5))
    model.add_adapter("b", config(target_modules=[target], smoa_dropout=0.5))
    model.eval()
    model.base_model.set_adapter(["default", "b"])
    assert torch.equal(out(model), out(model))
    names = {"adapter_names": ["default", "b"]}
    assert torch.equal(out(model, **names), out(model, **names))
    fresh = get_peft_model(Convolved(), config(target_modules=["line"], smoa_dropout=0.5)).eval()
    fresh.add_adapter("b", config(target_modules=[target], smoa_dropout=0.5))  # whose dropout is new
    fresh.base_model.set_adapter(["default", "b"])
    assert torch.equal(out(fresh), out(fresh))


@pytest.mark.parametrize("by_names", [False, True])
def test_gradients_are_those_of_the_forwards_factors_or_an_error(by_names: bool) -> None:  # L7
    torch.manual_seed(0)
    model = get_peft_model(Convolved(), config(target_modules=["line"])).train()
    linear = get_peft_model(llama(), config()).train()
    for each in (model, linear) if by_names else (model,):
        kwargs: Any = {"adapter_names": ["default", "default"]} if by_names else {}
        trained = [p for p in each.parameters() if p.requires_grad]

        def loss(each: Any = each, kwargs: Any = kwargs) -> Tensor:
            found = each(X, **kwargs)
            return getattr(found, "logits", found).square().mean()  # type: ignore[no-any-return]

        expected = torch.autograd.grad(loss(), trained)
        value = loss()
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
        try:
            found = torch.autograd.grad(value, trained)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017  # it may also be right
        else:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_threads_with_and_without_experts_do_not_meet() -> None:  # L16
    model = get_peft_model(
        build_mixture("qwen3_moe"),
        config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        adapter_name="experts",
    ).eval()
    model.add_adapter("plain", config(target_modules=["q_proj"]))
    x = tokens(4)
    expected = out(model, x), out(model, x, adapter_names=["plain", "__base__"])
    failed: list[Any] = []

    def run(which: int) -> None:
        try:
            for _ in range(340):
                names = {"adapter_names": ["plain", "__base__"]} if which else {}
                if not torch.equal(out(model, x, **names), expected[which]):
                    failed.append(which)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []


def test_a_call_of_experts_may_end_within_one_of_another_thread() -> None:  # L16
    model = get_peft_model(
        build_mixture("qwen3_moe"),
        config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ).eval()
    x, found = tokens(4), []
    expected = out(model, x)
    experts = next(module for name, module in model.named_modules() if name.endswith("experts.base_layer.base_layer"))

    def call_in_another_thread(*args: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=lambda: found.append(out(model, x)))
        thread.start()
        thread.join()

    hook = experts.register_forward_pre_hook(call_in_another_thread)
    assert torch.equal(out(model, x), expected)
    assert torch.equal(found[0], expected)


def test_a_replica_of_data_parallel_is_refused_by_name() -> None:  # L19
    layer = next(iter(smoa_layers(get_peft_model(llama(), config())).values()))
    with pytest.raises(UnsupportedModuleError, match=r"DataParallel.*torchrun"):
        layer._replicate_for_data_parallel()


def test_hotswap_takes_an_adapter_that_was_saved_without_tables(tmp_path: Path) -> None:  # L17
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    other = get_peft_model(llama(), config(**targets)).eval()
    for tables in (False, True):
        other.save_pretrained(tmp_path / str(tables), save_embedding_layers=tables)
        model = get_peft_model(llama(), config(**targets)).eval()
        assert not torch.equal(out(model), out(other))
        hotswap_adapter(model, tmp_path / str(tables))
        assert torch.equal(out(model), out(other))


# Settings and messages.


def test_a_rank_below_the_number_of_blocks_warns() -> None:  # L11
    with pytest.warns(UserWarning, match=r"r is smaller than num_blocks in .*q_proj"):
        get_peft_model(llama(), config(r=2, num_blocks=4))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"num_block": 2}])
def test_a_setting_that_there_is_not_is_named(settings: dict[str, Any]) -> None:  # L23
    with pytest.raises(ConfigError, match=f"got an unexpected keyword argument '{next(iter(settings))}'"):
        SmoaConfig(**settings)


def test_a_new_adapter_for_tied_layers_is_refused(tmp_path: Path) -> None:
    for given in (config(target_modules=["lm_head"], ensure_weight_tying=True), SmoaConfig.from_pretrained(TIED)):
        base = golden.base("gemma3")
        with pytest.raises(ConfigError, match=r"ensure_weight_tying: .*share one weight.*name one of them"):
            get_peft_model(base, given)
        assert not smoa_layers(base)
    with pytest.raises(ConfigError, match=r"ensure_weight_tying: .*is_trainable=False"):
        PeftModel.from_pretrained(golden.base("gemma3"), TIED, is_trainable=True)
    PeftModel.from_pretrained(golden.base("gemma3"), TIED).save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys() == load_file(TIED / "adapter_model.safetensors").keys()
    )


def test_autocast_does_not_round_the_product_of_the_factors_where_the_weight_trains() -> None:  # E7
    errors = []
    for trains in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(96, 96)}), config(target_modules=["layer"]))
        (layer,) = smoa_layers(model).values()
        layer.get_base_layer().weight.requires_grad_(trains)
        x, weight = torch.randn(64, 96), layer.get_base_layer().weight.detach()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        g = torch.randn_like(y.float())
        (y.float() * g).sum().backward()
        A = layer.smoa_A["default"].weight
        found = A.grad.double()
        A.grad = None
        ((x @ (weight + layer.update("default").delta(weight)).T) * g).sum().backward()
        errors.append(float((found - A.grad.double()).norm() / A.grad.double().norm()))
    assert errors[1] <= 1.3 * errors[0]


def test_copies_with_biases_are_loaded_under_another_name(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.LayerNorm(8))

    settings = {"target_modules": ["0"], "bias": "all", "modules_to_save": ["2"], "init_weights": False}
    model = get_peft_model(base(), SmoaConfig(r=4, num_blocks=2, **settings), adapter_name="one").eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            parameter.data.add_(1.0)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    for name in ("one", "default", "two"):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name=name).eval()
        assert torch.equal(loaded(x), model(x)), name


def test_a_bias_at_the_root_of_a_model_is_saved() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = nn.Linear(12, 8), nn.Parameter(torch.zeros(8))

    model = inject_adapter_in_model(SmoaConfig(r=4, num_blocks=2, target_modules=["layer"], bias="all"), Root())
    assert {"bias", "layer.base_layer.bias"} <= get_peft_model_state_dict(model, adapter_name="default").keys()


def test_a_refused_load_leaves_tables_that_refuse_to_change(tmp_path: Path) -> None:
    class Frozen(OrderedDict):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("frozen")

    get_peft_model(llama(seed=1), config()).save_pretrained(tmp_path)
    base = llama()
    base.own = Frozen(a=1)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.own) == {"a": 1}


# Labels that others' tools leave out, convert or average.


@pytest.mark.parametrize("partition", ["random", "spectral", "contiguous"])
def test_factors_without_the_labels_of_their_blocks_are_told(partition: Any) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return get_peft_model(
            Wrapper(linear), SmoaConfig(r=4, num_blocks=2, partition=partition, target_modules=["layer"])
        )

    linear = nn.Linear(12, 8)
    first, second = model(1), model(2)
    trained = {name: parameter for name, parameter in first.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        second.load_state_dict(first.state_dict())
        assert not found
        second.load_state_dict(trained, strict=False)
    assert len(found) == (partition != "contiguous")
    assert all("has factors and no labels of their blocks" in str(warning.message) for warning in found)


def of_floats(dtype: torch.dtype, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_that_was_made_float_is_saved_with_labels_and_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    model = get_peft_model(llama(), config()).eval()  # DeepSpeed's zero_to_fp32 makes labels float32, too
    model.save_pretrained(tmp_path, state_dict=of_floats(dtype, model.state_dict()))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {saved[key].dtype for key in saved if "labels" in key} == {torch.uint8}
    assert {saved[key].dtype for key in saved if "scale" in key} == {torch.float32}
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(out(loaded), out(model), atol=0 if dtype == torch.float32 else 0.1)
    other = get_peft_model(llama(), config()).eval()
    assert not torch.equal(out(other), out(model))
    set_peft_model_state_dict(other, of_floats(torch.float32, get_peft_model_state_dict(model)))
    assert torch.equal(out(other), out(model))
    state = {key: tensor + 0.5 if "labels" in key else tensor for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"labels.*: holds no labels \(torch.float32\)"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("weights", [(0.9, 0.1), (1.0, 1.0)])
def test_an_average_of_equal_labels_is_these_and_what_is_no_partition_is_said_in_a_call(
    weights: tuple[float, float],
) -> None:
    model = get_peft_model(llama(), config(num_blocks=8, r=8)).eval()
    mean, (old, new) = copy.deepcopy(model), weights
    for _ in range(3):
        states = zip(mean.state_dict().items(), model.state_dict().values(), strict=True)
        mean.load_state_dict({key: old * tensor + new * other for (key, tensor), other in states})
    if old + new == 1:
        assert torch.allclose(out(mean), out(model), atol=1e-4)
        return
    with pytest.raises(PartitionError, match="are no partition any more, as after averaging buffers"):
        out(mean)
