"""K by layer: as a pattern gives it, or as the spectra of the weights do."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import AdapterFileError, ConfigError, MergeError, PartitionError, SmoaConfig
from smoa.export.merge import merge_and_save
from smoa.tuner.block_choice import choose_blocks
from smoa.tuner.hotswap import hotswap_adapter
from tests.support import tiny_models
from tests.support.adapter_files import with_settings
from tests.support.decompositions import NoDecomposition
from tests.support.layers import adapted_layer, base_layer, base_weight, oracle_delta, smoa_layers
from tests.support.quantized import quantized_layer
from tests.support.tiny_mixtures import EXPERTS, build_mixture, wrappers
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: list[dict[str, Any]] = [
    {"num_blocks_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}},
    {"num_blocks_pattern": {"v_proj": 2}, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5.0}},
    {"blocks_from_spectrum": True},
    {"blocks_from_spectrum": True, "normalize_anchor": True},
]


def adapted(seed: int = 1, **options: Any) -> PeftModel:
    """A tiny Llama, some of whose weights have lost a part of their spectrum, with an adapter that is no no-op."""
    torch.manual_seed(seed)
    model = tiny_models.build("llama")
    flatten(model, "down_proj", 0.2)
    flatten(model, "v_proj", 3.0)
    settings = {"r": 8, "num_blocks": 4, "alpha": 12.0, "target_modules": TARGETS, "init_weights": False}
    return get_peft_model(model, SmoaConfig(**settings | options)).eval()


@torch.no_grad()
def flatten(model: nn.Module, name: str, power: float) -> None:
    """Raise the singular values of all weights of that name to a power."""
    for module_name, module in model.named_modules():
        if module_name.endswith(name):
            U, sigma, Vh = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_(U * sigma**power @ Vh)


def used_share(weight: Tensor) -> float:
    """exp of the entropy of the normalized singular values, over their number."""
    sigma = torch.linalg.svdvals(weight.double()).tolist()
    shares = [value / sum(sigma) for value in sigma]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0)) / len(sigma)


def test_a_pattern_sets_the_blocks_of_the_layers_it_names() -> None:
    model = adapted(num_blocks_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 6})
    for name, layer in smoa_layers(model).items():
        expected = 2 if name.endswith("v_proj") else 6 if name.endswith("1.mlp.down_proj") else 4
        assert len(layer.ranks["default"]) == expected
        assert layer.r["default"] == 8
        assert_close(layer.delta("default").double(), oracle_delta(layer), dtype=torch.float32)


def test_blocks_follow_the_effective_rank_of_the_weights_and_keep_what_they_cost() -> None:
    model = adapted(blocks_from_spectrum=True)
    found = smoa_layers(model)
    shares = {name: used_share(base_weight(layer)) for name, layer in found.items()}
    mean = sum(shares.values()) / len(shares)
    assert len(set(model.peft_config["default"].num_blocks_pattern.values())) > 2
    for name, layer in found.items():
        K = len(layer.ranks["default"])
        assert model.peft_config["default"].num_blocks_pattern[name] == K == round(4 * shares[name] / mean)
        assert set(layer.ranks["default"]) == {2}
        assert layer.scaling["default"] == pytest.approx(12 / 8)
        assert_close(layer.delta("default").double(), oracle_delta(layer), dtype=torch.float32)
    same = sum(parameter.numel() for parameter in adapted().parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == pytest.approx(
        same, rel=0.15
    )


def test_alpha_left_out_stays_the_rank_of_each_layer() -> None:
    model = adapted(blocks_from_spectrum=True, alpha=None)
    assert {layer.scaling["default"] for layer in smoa_layers(model).values()} == {1.0}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_a_saved_adapter_brings_its_blocks(options: dict[str, Any], low_memory: bool, tmp_path: Path) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    base = adapted().unload()
    with NoDecomposition():
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_merge_on_disk_knows_the_blocks(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    model.save_pretrained(tmp_path / "adapter")
    adapted().unload().save_pretrained(tmp_path / "base")
    merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(model))


def test_a_config_that_is_used_again_is_fitted_to_the_new_weights() -> None:
    config = SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS, blocks_from_spectrum=True)
    before = copy.deepcopy(config)
    models = [get_peft_model(model, config) for model in (tiny_models.build("llama"), adapted().unload())]
    for model in models:
        own = model.peft_config["default"].num_blocks_pattern
        assert own == {name: len(layer.ranks["default"]) for name, layer in smoa_layers(model).items()}
    even, flat = (model.peft_config["default"].num_blocks_pattern for model in models)
    assert even != flat
    assert {**config.to_dict(), "base_model_name_or_path": None} == {
        **before.to_dict(),
        "base_model_name_or_path": None,
    }


def test_a_pattern_goes_before_the_spectrum() -> None:
    model = adapted(blocks_from_spectrum=True, num_blocks_pattern={"v_proj": 2})
    for name, layer in smoa_layers(model).items():
        assert set(layer.ranks["default"]) == {2}  # r / num_blocks
        assert (len(layer.ranks["default"]) == 2) == name.endswith("v_proj")


def test_the_blocks_of_hundreds_of_layers_are_looked_up_by_name() -> None:
    names = {f"model.layers.{i}.{target}": 2 + i % 3 for i in range(1000) for target in TARGETS}
    config = SmoaConfig(r=8, num_blocks=4, blocks_from_spectrum=True, num_blocks_pattern=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoa.config.adapter_config.get_pattern_key", None)  # would take a second for each name
        assert {name: config.num_blocks_of(name) for name in names} == names


@pytest.mark.parametrize("option", ["blocks_from_spectrum", "normalize_anchor"])
def test_what_a_layer_chose_is_saved_though_the_config_has_served_another_model(option: str, tmp_path: Path) -> None:
    config = SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS, init_weights=False, **{option: True})
    base = adapted().unload()
    first = get_peft_model(copy.deepcopy(base), config)
    get_peft_model(tiny_models.build("llama"), config)
    first.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(first.eval()))


def test_a_second_adapter_can_have_blocks_of_its_own() -> None:
    model = adapted()
    model.add_adapter("other", SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS, blocks_from_spectrum=True))
    fresh = adapted(blocks_from_spectrum=True)
    assert model.peft_config["other"].num_blocks_pattern == fresh.peft_config["default"].num_blocks_pattern


@pytest.mark.parametrize("kind", ["conv1d", "nf4", "int8"])
def test_blocks_are_chosen_for_weights_however_they_are_stored(kind: str) -> None:
    base = base_layer(24, 64, conv1d=True) if kind == "conv1d" else quantized_layer(kind)
    layer = adapted_layer(base, r=8, num_blocks=4, blocks_from_spectrum=True)
    assert len(layer.ranks["default"]) == 4


def test_a_layer_gets_at_least_one_block_and_no_more_than_it_has_room_for() -> None:
    spiky = torch.outer(torch.ones(8), torch.ones(8)) + 1e-4 * torch.eye(8)
    weights = {"zero": torch.zeros(8, 8), "spiky": spiky, "flat": torch.eye(8), "narrow": torch.eye(3)}
    chosen = choose_blocks({name: lambda weight=weight: weight for name, weight in weights.items()}, 8)
    assert chosen == {"zero": 1, "spiky": 2, "flat": 8, "narrow": 3}
    assert choose_blocks({"zero": lambda: torch.zeros(4, 4)}, 2) == {"zero": 1}


def test_weights_without_a_spectrum_are_named() -> None:
    with pytest.raises(PartitionError, match="layer: blocks_from_spectrum needs the base weights"):
        adapted_layer(nn.Linear(6, 6, device="meta"), r=2, num_blocks=2, blocks_from_spectrum=True)
    base = nn.Linear(6, 6)
    nn.init.constant_(base.weight, float("nan"))
    with pytest.raises(PartitionError, match="layer: the weight has NaN or infinite entries"):
        adapted_layer(base, r=2, num_blocks=2, blocks_from_spectrum=True)


def test_too_many_blocks_for_a_layer_are_refused_by_its_name() -> None:
    with pytest.raises(PartitionError, match=r"v_proj: num_blocks=17 must be between 1 and 16"):
        adapted(num_blocks_pattern={"v_proj": 17})


def test_a_swap_needs_the_same_blocks(tmp_path: Path) -> None:
    options = {"num_blocks_pattern": {"v_proj": 2}}
    slot, new = adapted(**options), adapted(seed=2, r=6, **options)
    new.save_pretrained(tmp_path)
    hotswap_adapter(slot, tmp_path)
    assert_close(logits(slot), logits(new))
    with pytest.raises(ConfigError, match="num_blocks_pattern"):
        hotswap_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
def test_adapters_of_different_blocks_by_layer_are_not_combined(options: dict[str, Any]) -> None:
    model = adapted(**options)
    model.add_adapter("other", SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS))
    with pytest.raises(MergeError, match="num_blocks_pattern"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_a_config_that_lacks_a_layer_or_asks_for_more_rank_than_saved_is_refused(tmp_path: Path) -> None:
    model = adapted(blocks_from_spectrum=True)
    chosen = model.peft_config["default"].num_blocks_pattern
    model.save_pretrained(tmp_path)
    base = adapted().unload()
    first = sorted(chosen)[0]
    with_settings(tmp_path, num_blocks_pattern={name: K for name, K in chosen.items() if name != first})
    with pytest.raises(
        PartitionError, match=rf"adapter_config\.json: {first}: num_blocks_pattern names neither it nor 0 more"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    for settings in ({"num_blocks_pattern": {**chosen, first: 200}}, {"num_blocks_pattern": chosen, "r": 10**9 * 4}):
        with_settings(tmp_path, **settings)
        with pytest.raises(AdapterFileError, match="asks for rank"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_blocks_pattern": {"v_proj": 0}}, r"num_blocks_pattern\['v_proj'\]=0"),
        ({"num_blocks_pattern": {"v_proj": 2}, "block_ranks": [2, 2, 2, 2]}, "block_ranks and num_blocks_pattern"),
        ({"spectrum_blocks": {"v_proj": 2}}, "without blocks_from_spectrum"),
        ({"blocks_from_spectrum": True, "block_ranks": [2, 2, 2, 2]}, "drop block_ranks"),
        ({"blocks_from_spectrum": True, "r": 10}, "num_blocks=4 to divide every r, found 10"),
        ({"blocks_from_spectrum": True, "rank_pattern": {"v_proj": 5}}, "found 5"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SmoaConfig(**{"r": 8, "num_blocks": 4, "target_modules": TARGETS, **options})


def test_the_matrices_of_experts_get_blocks_by_their_mean_share() -> None:
    torch.manual_seed(1)
    experts = torch.randn(4, 8, 8)
    experts[2:] = torch.outer(torch.ones(8), torch.ones(8)) + 1e-4 * torch.eye(8)
    shares = {"experts": sum(map(used_share, experts)) / 4, "layer": used_share(experts[0])}
    chosen = choose_blocks({"experts": lambda: experts, "layer": lambda: experts[0]}, 4)
    mean = sum(shares.values()) / 2
    assert chosen == {name: round(4 * share / mean) for name, share in shares.items()}
    assert chosen["experts"] < chosen["layer"]


def test_blocks_of_experts_are_chosen_saved_and_loaded(tmp_path: Path) -> None:
    base = build_mixture("qwen3_moe")
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj.copy_(torch.ones(()) + 1e-3 * torch.randn(5, 24, 16))
    settings = {"r": 8, "num_blocks": 4, "blocks_from_spectrum": True, "init_weights": False}
    config = SmoaConfig(target_modules=["q_proj"], target_parameters=EXPERTS, **settings)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    chosen = model.peft_config["default"].num_blocks_pattern
    place = "model.layers.0.mlp.experts"
    assert chosen[f"{place}.down_proj"] == 1
    assert chosen[f"{place}.gate_up_proj"] > 4
    for name, wrapper in wrappers(model).items():
        assert len(wrapper.ranks["default"]) == chosen[f"{place}.{name}"]
        assert wrapper.r["default"] == 2 * chosen[f"{place}.{name}"]
    model.save_pretrained(tmp_path)
    with NoDecomposition():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    for name, wrapper in wrappers(loaded).items():
        assert torch.equal(wrapper.delta("default"), wrappers(model)[name].delta("default"))
    model.add_adapter("second", config)
    assert model.peft_config["second"].num_blocks_pattern == chosen
