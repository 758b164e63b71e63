import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from smoa import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa_lab.budget import budget_parameters, size_methods
from smoa_lab.config.methods import find_method, method_names
from tests.support import lab
from tests.support.tiny import EXPERTS, build


def test_a_model_that_cannot_be_had_or_has_no_such_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.name: cannot load"):
        size_methods(str(tmp_path), "9", ["q_proj"])
    with pytest.raises(ConfigError, match="nowhere"):
        size_methods(str(lab.tiny_base(tmp_path)), "9", ["nowhere"])


def test_a_budget_that_is_none_or_buys_nothing_is_refused(base: str) -> None:
    for amount, message in (("0", "must be more than 0"), ("200%", "must be more than 0"), ("x", "neither")):
        with pytest.raises(ConfigError, match=message):
            budget_parameters(amount, 1000, 10)
    first, *_ = size_methods(base, "1", ["q_proj", "o_proj"])
    assert (first.adapter, first.parameters) == ({"num_blocks": 1}, None)
    assert "r can't make it so small: it trains 256 or more" in first.note


def test_a_narrow_layer_is_counted_with_the_blocks_and_rank_that_it_gets(tmp_path: Path) -> None:
    base = LlamaConfig(
        hidden_size=12,
        head_dim=2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=8,
    )
    base.save_pretrained(tmp_path)
    for found in size_methods(str(tmp_path), "250", ["q_proj", "v_proj"]):
        r, num_blocks = found.adapter["r"], found.adapter["num_blocks"]
        config = SmoaConfig(r=r, num_blocks=num_blocks, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_config(base), config)
        assert found.parameters == model.get_nb_trainable_parameters()[0] <= 255
        assert r % num_blocks == 0


def test_loras_budget_is_what_lora_trains_on_the_same_layers(base: str) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules="all-linear"))
    of_lora = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    (smoa,) = size_methods(base, "LoRA:3", ["all-linear"], ["smoa"], {"smoa": {"num_blocks": 4}})
    assert (smoa.adapter, smoa.parameters) == ({"r": 12}, of_lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(lab.tiny_base(tmp_path_factory.mktemp("base")))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of single methods
@pytest.mark.parametrize(
    ("name", "key"),
    {
        **dict.fromkeys(("lora", "smoa", "dora", "vera", "hira", "shira"), "r"),
        "adalora": "init_r",
        "fourierft": "n_frequency",
        "unilora": "theta_d_length",
    }.items(),
)
def test_a_method_is_sized_by_one_key_to_what_peft_then_counts(name: str, key: str, base: str) -> None:
    if name not in method_names():
        pytest.skip("not in this PEFT")
    targets = ("q_proj", "down_proj")
    (sized,) = size_methods(base, "lora:6", targets, [name], {"smoa": {"num_blocks": 2}})
    assert list(sized.adapter) == [key]
    own = {"total_step": 1} if name == "adalora" else {}
    config = find_method(name).peft_config({"target_modules": list(targets), **own, **sized.adapter})
    assert config is not None
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    assert sized.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    wanted = 6 * 2 * (32 + 32 + 32 + 48)
    assert 0.85 * wanted <= sized.parameters <= 1.02 * wanted


def test_a_method_whose_counts_make_no_line_has_the_size_that_its_keys_say(base: str) -> None:
    for block_size, trained in ((8, 1024 // 8), (32, 1024 // 32)):
        settings = {"c3a": {"block_size": block_size}}
        (sized,) = size_methods(base, "70", ("q_proj",), ["c3a"], settings)
        assert (sized.adapter, sized.parameters) == ({}, 2 * trained)
        assert "--set c3a.KEY=VALUE" in sized.note


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "parameters", "note"),
    [
        ("ia3", 160, "is sized by --set ia3"),
        ("trainable_tokens", 0, "is sized by --set"),
        ("full", 32_096, "trains all weights"),
        ("loha", None, r"r can't make it so small: it trains 576 or more"),
        ("vblora", None, "must be divisible by `vector_length` 256"),
    ],
)
def test_a_method_that_cannot_be_sized_says_why(name: str, parameters: int | None, note: str, base: str) -> None:
    if name not in method_names():
        pytest.skip("not in this PEFT")
    (sized,) = size_methods(base, "lora:1", ("q_proj", "down_proj"), [name])
    assert (sized.adapter, sized.parameters) == ({}, parameters)
    assert re.search(note, sized.note)


def test_experts_are_sized_if_their_parameters_are_named(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    config = SmoaConfig(r=6, num_blocks=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    trained = get_peft_model(build("qwen3_moe"), config).get_nb_trainable_parameters()[0]
    settings = {"smoa": {"num_blocks": 2}}
    (found,) = size_methods(str(tmp_path), str(trained), ["q_proj", *EXPERTS], ["smoa"], settings)
    assert (found.adapter, found.parameters) == ({"r": 6}, trained)
