"""What PEFT promises of every method holds for SMoA too."""

import copy
import gc
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from smoa import SmoaConfig
from tests.support import tiny
from tests.support.layers import assert_close, factors, randomise, ranks, smoa_layers
from tests.support.tiny import EXPERTS, QV, adapted, add_adapter, build, logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- which modules are adapted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_the_targets_of_an_architecture_are_those_of_lora(family: str, targets: Any) -> None:
    own = get_peft_model(tiny.build(family), SmoaConfig(r=4, target_modules=targets))
    lora = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    assert set(own.targeted_module_names) == set(get_peft_model(tiny.build(family), lora).targeted_module_names)
    assert "lm_head" not in own.targeted_module_names


def test_rank_and_alpha_follow_their_patterns(tiny_llama: PreTrainedModel) -> None:
    model = adapted(
        tiny_llama, alpha=8.0, rank_pattern={"v_proj": 6, "layers.1.self_attn.q_proj": 3}, alpha_pattern={"v_proj": 3.0}
    )
    found = {
        name.removeprefix("model.layers."): (ranks(layer), layer.scaling["default"])
        for name, layer in smoa_layers(model).items()
    }
    assert found == {
        "0.self_attn.q_proj": ([2, 2], 2.0),
        "0.self_attn.v_proj": ([3, 3], 0.5),
        "1.self_attn.q_proj": ([2, 1], 8 / 3),
        "1.self_attn.v_proj": ([3, 3], 0.5),
    }


# --- what is trained and saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "smoa_only"])
def test_the_biases_asked_for_are_trained(bias: Any) -> None:
    base = tiny.build("bert")
    names = trainable(adapted(base, target_modules=["query"], bias=bias))
    biases = {name for name in names if name.endswith(".bias")}
    every = {name for name, _ in base.named_parameters() if name.endswith(".bias")}
    of_layers = {name for name in every if ".query.base_layer." in name}
    expected = {"none": set(), "all": every, "smoa_only": of_layers}[bias]
    assert {name.removeprefix("base_model.model.") for name in biases} == expected
    assert names - biases == {
        f"base_model.model.bert.encoder.layer.{i}.attention.self.query.smoa_{factor}.default.weight"
        for i in (0, 1)
        for factor in "AB"
    }


class Scored(nn.Module):
    """Two layers, and a parameter with a bias in its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.score = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.position_bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.score(self.v(self.q(x) + self.position_bias))
        return output


@pytest.mark.parametrize(
    "settings", [{"bias": "smoa_only"}, {"bias": "all"}, {"bias": "all", "modules_to_save": ["score"]}], ids=str
)
def test_the_biases_of_one_of_two_adapters_are_saved_and_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    base = Scored()
    config = SmoaConfig(r=2, num_blocks=2, target_modules=["q"], init_weights=False, **settings)
    model = get_peft_model(copy.deepcopy(base), config)
    others = {"target_modules": ["v" if settings["bias"] == "smoa_only" else "q"]}
    model.add_adapter("other", SmoaConfig(r=2, num_blocks=2, modules_to_save=config.modules_to_save, **others))
    model.set_adapter("default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".v." not in name:
                parameter += 0.1
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    x = torch.randn(2, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_a_model_that_was_made_on_a_terminal_can_be_copied(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    model = adapted(tiny_llama)
    assert_close(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [5, 7]}}], ids=str
)
def test_what_is_trained_besides_is_saved(
    tiny_llama: PreTrainedModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(tiny_llama, **settings)
    (name,) = (name for name in trainable(model) if "smoa_" not in name)
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("dtype", "autocast_adapter_dtype"), [(torch.bfloat16, True), (torch.float16, False)])
def test_factors_are_in_float32_unless_asked_otherwise(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    base = tiny.build("llama", dtype)
    model = get_peft_model(
        base, SmoaConfig(r=4, target_modules=QV), autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {f.dtype for layer in smoa_layers(model).values() for f in factors(layer)} == {expected}
    for layer in smoa_layers(model).values():
        assert {tensor.dtype for tensor in (layer.smoa_row_labels["default"], layer.smoa_col_labels["default"])} == {
            torch.uint8
        }
        assert layer.smoa_block_scale["default"].dtype == torch.float32
    assert model(**tiny.batch("llama")).logits.dtype == dtype
    model(**tiny.batch("llama")).loss.backward()


# --- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_that_came_and_went_leave_no_tensor_and_no_name() -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "target_parameters": EXPERTS}
    model = get_peft_model(build("qwen3_moe"), SmoaConfig(**settings)).eval()
    ids = tiny.batch("llama")["input_ids"]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def live(name: str) -> None:
        model.add_adapter(name, SmoaConfig(**settings))
        model.set_adapter(name)
        model(ids)
        model.merge_adapter()
        model.unmerge_adapter()
        model.set_adapter("default")
        model.delete_adapter(name)

    live("first")
    gc.collect()
    gc.freeze()  # what is there already need not be counted each time
    before = tensors()
    for name in ("second", "third"):
        live(name)
    assert tensors() == before
    gc.unfreeze()
    for layer in smoa_layers(model).values():
        held = {**vars(layer), **layer._modules}.items()
        assert not [key for key, value in held if hasattr(value, "keys") and "third" in value]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_is_loaded_whether_or_not_another_is_on_an_embedding(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = adapted(tiny_llama, target_modules=["embed_tokens", "lm_head"])
    add_adapter(model, "other", target_modules=["lm_head", "q_proj"])
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    alone = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "other").eval()
    assert torch.equal(logits(alone), logits(model))
    alone.save_pretrained(tmp_path / "alone")
    for low_cpu_mem_usage in (False, True):
        beside = PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
        beside.load_adapter(tmp_path / "alone", "other", low_cpu_mem_usage=low_cpu_mem_usage)
        beside.set_adapter("other")
        assert torch.equal(logits(beside), logits(model))


def test_an_average_of_parameters_is_a_model_of_the_same_blocks(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama, num_blocks=4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        average.update_parameters(model)
    assert_close(logits(average.module), logits(model))


# --- the ways in -----------------------------------------------------------------------------------------------------


def test_a_deep_copy_of_a_merged_model_unmerges_on_its_own(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    expected = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), expected)
    assert all(layer.merged for layer in smoa_layers(model).values())
    for layer in smoa_layers(twin).values():
        randomise(layer)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_transformers_own_adapter_interface_takes_smoa(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.add_adapter(SmoaConfig(r=4, num_blocks=2, target_modules=QV), "mine")
    for layer in smoa_layers(model).values():
        randomise(layer, "mine")
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = tiny.build("llama")
    plain = logits(fresh)
    fresh.load_adapter(str(tmp_path), "mine")
    fresh.eval()
    assert torch.equal(logits(fresh), expected)
    fresh.disable_adapters()
    assert torch.equal(logits(fresh), plain)
    fresh.enable_adapters()
    assert torch.equal(logits(fresh), expected)


def test_low_cpu_mem_usage_makes_meta_factors_only(tiny_llama: PreTrainedModel) -> None:
    model = get_peft_model(tiny_llama, SmoaConfig(r=4, target_modules=QV), low_cpu_mem_usage=True)
    for layer in smoa_layers(model).values():
        assert {factor.device.type for factor in factors(layer)} == {"meta"}
        assert layer.get_base_layer().weight.device.type == "cpu"


# --- layers of an unusual kind ---------------------------------------------------------------------------------------


# --- the config of an adapter ----------------------------------------------------------------------------------------


def written(smoa: SmoaConfig, lora: LoraConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of which smoa's config has another value than LoRA's, where LoRA's config has them."""
    ours, theirs = (config.to_dict() for config in (smoa, lora))
    return {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


@pytest.mark.parametrize("targets", [None, r".*\.q_proj"], ids=str)
def test_the_model_holds_the_config_that_was_passed_and_writes_into_it_what_peft_writes(targets: Any) -> None:
    configs: list[Any] = []
    for config in (SmoaConfig(r=4, alpha=8, target_modules=targets), LoraConfig(r=4, target_modules=targets)):
        before = copy.deepcopy(config)
        model = get_peft_model(tiny.build("llama"), config)
        assert model.peft_config["default"] is model.base_model.peft_config["default"] is config
        model(**tiny.batch("llama"))
        changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(before, f.name)}
        assert changed <= {"target_modules", "base_model_name_or_path"}
        configs.append(config)
    ours, theirs = configs
    assert isinstance(ours.target_modules, str) if targets == r".*\.q_proj" else ours.target_modules
    assert written(ours, theirs).keys() == {"peft_type"}


def test_random_blocks_follow_the_seed_and_the_layers_name() -> None:
    found = []
    for seed in (1, 1, 2):
        base = tiny.build("llama")
        torch.manual_seed(seed)
        torch.rand(len(found))  # what was drawn before does not count
        model = get_peft_model(base, SmoaConfig(target_modules=["q_proj"], partition="random"))
        found.append([layer.blocks("default").row_labels.tolist() for layer in smoa_layers(model).values()])
    assert found[0] == found[1]
    assert len({str(labels) for labels in found[0] + found[2]}) == 4


# one config object for several adapters: reference adapters of TRL, and configs that change in between


QVD = ["q_proj", "v_proj", "down_proj"]


def copy_as_trl_does(model: Any) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("partition", ["spectral", "random"])
def test_the_reference_equals_a_start_trained_on_other_weights(
    partition: Any, tiny_llama: PreTrainedModel, tmp_path: Any
) -> None:
    settings: dict[str, Any] = {"target_modules": QVD, "init_weights": False, "partition": partition}
    config = SmoaConfig(r=8, num_blocks=4, other_base=True, **settings)
    get_peft_model(tiny_llama, config).save_pretrained(tmp_path)
    other = tiny.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():  # as after quantization: another spectrum, so other blocks if computed
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = PeftModel.from_pretrained(other, tmp_path, is_trainable=True).eval()
    copy_as_trl_does(model)
    reference, start = (get_peft_model_state_dict(model, adapter_name=name) for name in ("ref", "default"))
    assert reference.keys() == start.keys()
    assert all(torch.equal(reference[name], start[name]) for name in start)


@pytest.mark.parametrize(
    "changes", [{"num_blocks": 4}, {"target_modules": ["k_proj", "v_proj"]}, {"partition": "contiguous"}], ids=str
)
def test_an_adapter_of_a_changed_config_is_that_of_a_config_of_its_own(
    changes: dict[str, Any], tiny_llama: PreTrainedModel
) -> None:
    config = SmoaConfig(r=8, target_modules=QVD)
    model = get_peft_model(tiny_llama, config)
    for name, value in changes.items():
        setattr(config, name, value)
    model.add_adapter("other", config)
    alone = get_peft_model(tiny.build("llama"), SmoaConfig(**{"r": 8, "target_modules": QVD} | changes))
    expected = get_peft_model_state_dict(alone)
    state = get_peft_model_state_dict(model, adapter_name="other")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state if "smoa_A" not in key)


def test_a_layer_that_has_none_of_the_adapters_is_left_alone_by_a_merge() -> None:
    model = get_peft_model(tiny.build("llama"), SmoaConfig(r=4, target_modules=["q_proj"], init_weights=False))
    model.add_adapter("second", SmoaConfig(r=4, target_modules=["v_proj"], init_weights=False))
    model.merge_adapter()
    assert [bool(layer.merged) for layer in smoa_layers(model).values()][:2] == [True, False]
