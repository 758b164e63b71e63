"""Faults that reading found (L1 to L24), through public calls and saved tensors. tests/lives looks for the next."""

import copy
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from smoa import (
    AdapterFileError,
    PartitionError,
    SmoaConfig,
    UnsupportedModuleError,
)
from smoa.hotswap import hotswap_adapter
from tests.support.layers import smoa_layers
from tests.support.tiny import build, rewritten

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
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


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_safe_merge_of_an_adapter_of_some_layers_passes_the_others_over() -> None:  # found by tests/lives
    model = get_peft_model(llama(), config(target_modules=["q_proj"])).eval()
    model.add_adapter("other", config(target_modules=["v_proj"]))
    model.merge_adapter(adapter_names=["other"], safe_merge=True)
    model.unmerge_adapter()


# Loading.


def test_a_load_over_a_name_of_the_same_settings_replaces_it(tmp_path: Path) -> None:
    other = get_peft_model(llama(), config(alpha=4.0)).eval()  # alpha = r, which None means
    other.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).eval()
    assert not torch.equal(out(model), out(other))
    model.load_adapter(tmp_path, "default")
    assert torch.equal(out(model), out(other))


def test_an_adapter_that_is_loaded_over_a_merged_one_is_there_once_it_is_unmerged(tmp_path: Path) -> None:
    saved = get_peft_model(llama(), config()).eval()
    saved.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config()).eval()
    model.merge_adapter()
    model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    assert torch.equal(out(model), out(saved))


def test_low_cpu_mem_usage_keeps_the_factors_bits(tmp_path: Path) -> None:  # L9
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    for key, tensor in model.state_dict().items():
        if ".smoa_A." in key:
            assert torch.equal(tensor, saved[key.replace(".default.", ".")])


# The base.


def test_another_base_is_refused_and_can_be_loaded_all_the_same(tmp_path: Path) -> None:  # L12
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    base = llama(seed=1)
    with pytest.raises(AdapterFileError, match=r"q_proj: .*trained on another base.*is off by \d+%.*other_base=True"):
        PeftModel.from_pretrained(base, tmp_path)
    by_transformers = llama(seed=1)  # which sets buffers past all hooks
    by_transformers.load_adapter(str(tmp_path))
    with pytest.raises(AdapterFileError, match="trained on another base"):
        by_transformers(X)
    model = get_peft_model(llama(seed=1), config())
    with pytest.raises(AdapterFileError, match="trained on another base"):
        hotswap_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        model.load_adapter(tmp_path, "other")
    told = SmoaConfig.from_pretrained(tmp_path)
    told.other_base = True
    PeftModel.from_pretrained(llama(seed=1), tmp_path, config=told).save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(llama(seed=1), tmp_path / "again")
    assert '"other_base": true' in (tmp_path / "again" / "adapter_config.json").read_text()


def test_a_base_that_peft_has_merged_a_lora_into_since_a_load_is_another_one(tmp_path: Path) -> None:
    get_peft_model(llama(), config(partition="contiguous")).save_pretrained(tmp_path / "before")
    base = PeftModel.from_pretrained(llama(), tmp_path / "before").unload()
    lora = LoraConfig(lora_alpha=99, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = get_peft_model(base, lora).merge_and_unload()  # writes through `.data`
    trained = get_peft_model(copy.deepcopy(merged), config(partition="contiguous"))
    trained.save_pretrained(tmp_path / "after")
    with pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(merged, tmp_path / "before")
    assert torch.equal(out(PeftModel.from_pretrained(merged, tmp_path / "after")), out(trained))


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


DOWN, VALUE = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
mixture = partial(build, "qwen3_moe")
BASES: dict[str, tuple[dict[str, Any], Callable[[], Any], bool]] = {
    "the same in 16 bits": ({}, lambda: llama(dtype=torch.bfloat16), True),
    "another, without modulation": ({"modulation": "none"}, lambda: llama(seed=1), True),
    "another, relative to it": ({"scale": "paper"}, lambda: llama(seed=1), True),
    "one changed layer": ({}, lambda: changed(DOWN, 0.5, llama), False),
    "one changed layer, by block": ({"scale": "block"}, lambda: changed(VALUE, 0.5, llama), False),
    "one changed layer, by layer": ({"scale": "layer"}, lambda: changed(DOWN, 0.5, llama), False),
    "the same experts": (EXPERTS, mixture, True),
    "changed experts": (EXPERTS, lambda: changed("model.layers.0.mlp.experts.down_proj", 2, mixture), False),
}


@pytest.mark.parametrize("case", BASES)
def test_another_base_is_seen_where_the_update_depends_on_it(tmp_path: Path, case: str) -> None:  # L12, L21
    settings, base, fits = BASES[case]
    get_peft_model(mixture() if settings is EXPERTS else llama(), config(**settings)).save_pretrained(tmp_path)
    with nullcontext() if fits else pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize(("factor", "fits"), [(1.0, True), (1.08, True), (0.93, True), (1.15, False), (0.85, False)])
def test_a_base_whose_blocks_are_off_by_a_tenth_is_another_one(tmp_path: Path, factor: float, fits: bool) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    with nullcontext() if fits else pytest.raises(AdapterFileError, match="trained on another base"):
        PeftModel.from_pretrained(changed(DOWN, factor, llama), tmp_path)


@pytest.mark.parametrize("side", ["row", "col"])
def test_labels_that_are_no_partition_fail_with_the_name_of_their_layer(tmp_path: Path, side: str) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.v_proj"
    rewritten(tmp_path, lambda tensors: tensors[f"base_model.model.{name}.smoa_{side}_labels"].zero_())
    with pytest.raises(PartitionError, match=rf"{name}: {side}_labels must hold 2 blocks"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_labels_of_experts_that_are_no_partition_fail_with_the_name_of_their_layer(tmp_path: Path) -> None:
    get_peft_model(mixture(), config(**EXPERTS)).save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in tensors if "row_labels" in key)][3] = 0  # of one expert

    rewritten(tmp_path, change)
    with pytest.raises(PartitionError, match=r"experts\.\w+: labels must hold 2 blocks"):
        PeftModel.from_pretrained(mixture(), tmp_path)


def test_a_state_dict_of_floats_is_loaded() -> None:
    model, other = (get_peft_model(llama(), config()).eval() for _ in range(2))  # DeepSpeed's zero_to_fp32 makes one
    assert not torch.equal(out(other), out(model))
    set_peft_model_state_dict(other, {k: tensor.float() for k, tensor in get_peft_model_state_dict(model).items()})
    assert torch.equal(out(other), out(model))


# Names.


def test_an_adapter_whose_name_begins_anothers_is_saved_without_its_layers(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="math")
    model.add_adapter("math-2", config(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    for name, target in {"math": "q_proj", "math-2": "v_proj"}.items():
        assert all(target in key for key in load_file(tmp_path / name / "adapter_model.safetensors"))


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
