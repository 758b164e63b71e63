import re
from collections import Counter
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from smoa import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import empty_model
from smoa_lab.budget import (
    adapter_bytes,
    budget_choice,
    budget_choices,
    budget_parameters,
    lora_parameters,
    parameters,
    rank_bound,
    shapes_of,
    size_methods,
)
from smoa_lab.config.methods import find_method, method_names
from smoa_lab.config.run import ModelSection
from tests import oracle
from tests.support import lab
from tests.support.layers import smoa_layers
from tests.support.tiny_mixtures import EXPERTS, build_mixture


def test_a_model_whose_shapes_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.name: cannot load"):
        budget_choices(str(tmp_path), "9", ("q_proj",))
    LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no layers named nowhere"):
        budget_choices(str(tmp_path), "9", ("nowhere",))
    assert shapes_of(empty_model(ModelSection(name=str(tmp_path))), ("q_proj",), "") == Counter({(8, 8): 1})


def test_a_budget_that_is_none_or_buys_nothing_is_refused(tmp_path: Path) -> None:
    for amount, message in (("0", "must be more than 0"), ("200%", "must be more than 0"), ("x", "neither")):
        with pytest.raises(ConfigError, match=message):
            budget_parameters(amount, 1000, 10)
    base = str(lab.tiny_base(tmp_path))
    with pytest.raises(ConfigError, match=r"budget: '1' is too small; the smallest adapter has 256 parameters"):
        budget_choices(base, "1", ("q_proj", "o_proj"))
    least = budget_choices(base, "256", ("q_proj", "o_proj"))
    assert {(choice.r - choice.num_blocks, choice.parameters) for choice in least} == {(0, 256)}


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
    choices = budget_choices(str(tmp_path), "250", ("q_proj", "v_proj"))
    assert [choice.num_blocks for choice in choices] == [1, 2, 4, 8]
    for choice in choices:
        config = SmoaConfig(r=choice.r, num_blocks=choice.num_blocks, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_config(base), config)
        ranks = [oracle.block_ranks(choice.r, choice.num_blocks)[:side] for side in (8, 2)]
        shapes = [(8, 12), (2, 12)]
        counted = [oracle.parameter_count(*shape, own) for shape, own in zip(shapes, ranks, strict=True)]
        assert choice.parameters == sum(counted) <= 250
        assert [list(layer.adapters["default"].ranks) for layer in smoa_layers(model).values()] == ranks
        bounds = [rank_bound(*shape, own) for shape, own in zip(shapes, ranks, strict=True)]
        assert choice.rank_bound == min(bounds)
        saved = [adapter_bytes(*shape, sum(own), len(own)) for shape, own in zip(shapes, ranks, strict=True)]
        assert choice.bytes_on_disk == sum(saved)


def test_loras_budget_is_what_lora_trains_on_the_same_layers(tmp_path: Path) -> None:
    base = str(lab.tiny_base(tmp_path))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules="all-linear"))
    of_lora = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    empty = empty_model(ModelSection(name=base))
    shapes, total = shapes_of(empty, ("all-linear",), base), empty.num_parameters()
    assert lora_parameters(shapes, 3) == of_lora
    assert {choice.lora_r for choice in budget_choices(base, "lora:3", ("all-linear",))} == {3}
    choice = budget_choice(shapes, total, "LoRA:3")
    assert (choice.num_blocks, choice.r, choice.parameters) == (4, 12, of_lora)


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
    (sized,) = size_methods(base, "lora:6", targets, [name])
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


def test_r_is_a_multiple_of_the_number_of_blocks() -> None:
    shapes = Counter({(8, 8): 1})
    assert [budget_choice(shapes, 1000, str(amount)).r for amount in (16, 31, 32, 63)] == [4, 4, 8, 12]
    odd = Counter({(7, 7): 1})
    assert budget_choice(odd, 1000, "14").parameters == 14
    with pytest.raises(ConfigError, match="too small; the smallest adapter has 14"):
        budget_choice(odd, 1000, "13")


def test_experts_are_counted_matrix_by_matrix_if_their_parameters_are_named() -> None:
    model = build_mixture("qwen3_moe")
    shapes = shapes_of(model, ("q_proj", *EXPERTS), "tiny")
    assert shapes == Counter({(16, 24): 10, (24, 16): 5, (24, 24): 1})
    config = SmoaConfig(r=6, num_blocks=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    trained = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
    assert parameters(shapes, 6, 2) == trained
