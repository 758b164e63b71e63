from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import ConfigError, SmoaConfig
from smoa.conversion import BlockSpectra, RankRule, UpdateSpectra, convert_to_lora
from smoa.layers.layer import SmoaLayer
from tests.support import tiny_models
from tests.support.layers import adapted_layer, base_layer, oracle_delta, smoa_layers
from tests.support.tiny_mixtures import EXPERTS, build_mixture, tokens
from tests.support.tiny_models import logits
from tests.support.tolerance import assert_close

# K divides neither side, K = 1, K = min(m, n).
SHAPES = [(17, 10, 4), (8, 5, 1), (6, 7, 6)]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def adapted(family: str = "llama", **config: Any) -> PeftModel:
    options = {"r": 4, "num_blocks": 2, "alpha": 12.0, "init_weights": False, "target_modules": TARGETS[family]}
    return get_peft_model(tiny_models.build(family), SmoaConfig(**options | config, task_type="CAUSAL_LM")).eval()


def deltas(model: PeftModel) -> dict[str, Tensor]:
    return {name: layer.delta("default").detach() for name, layer in smoa_layers(model).items()}


def spectrum_of(layer: SmoaLayer) -> BlockSpectra:
    [(_, weight, update)] = layer.parts("default")
    return BlockSpectra.of(update, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_singular_values_of_the_blocks_are_those_of_the_whole(shape: tuple[int, int, int]) -> None:
    out_features, in_features, num_blocks = shape
    layer = adapted_layer(base_layer(out_features, in_features), r=2 * num_blocks, num_blocks=num_blocks, alpha=3.0)
    expected = torch.linalg.svdvals(oracle_delta(layer))
    assert_close(spectrum_of(layer).values, expected[: min(out_features, in_features)])


@pytest.mark.parametrize("rank", [1, 6])
def test_a_cut_is_the_best_approximation_of_its_rank(rank: int) -> None:
    layer = adapted_layer(base_layer(17, 10), r=8, num_blocks=4)
    spectrum = spectrum_of(layer)
    A, B = spectrum.factors(rank, rank)
    U, S, Vh = torch.linalg.svd(oracle_delta(layer))
    assert_close(B @ A, U[:, :rank] * S[:rank] @ Vh[:rank])
    assert spectrum.error(rank) == pytest.approx(
        float((oracle_delta(layer) - B @ A).norm() / oracle_delta(layer).norm())
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
def test_tables_that_are_tied_are_saved_apart(tmp_path: Path) -> None:
    model = adapted("gpt2", target_modules=["wte"], ensure_weight_tying=True)
    convert_to_lora(model, rank=32).save(tmp_path)
    lora = PeftModel.from_pretrained(tiny_models.build("gpt2"), tmp_path).eval()
    torch.testing.assert_close(logits(lora, "gpt2"), logits(model, "gpt2"), rtol=1e-3, atol=1e-4)


def test_blockwise_the_same_cut_takes_a_share_of_the_numbers() -> None:
    layer = adapted_layer(base_layer(16, 12), r=8, num_blocks=4)
    assert spectrum_of(layer).converted("layer", 5, 5, 1).blockwise_parameters == 5 * (16 + 12) // 4


def test_a_rank_is_chosen_by_number_energy_or_error() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0, 0.5])
    assert [RankRule(rank=k).choose(singular) for k in (1, 3, 9)] == [1, 3, 4]
    assert RankRule(energy=9 / 14.25).choose(singular) == 1
    assert RankRule(energy=0.99).choose(singular) == 4
    assert RankRule(error=(1.25 / 14.25) ** 0.5 + 1e-9).choose(singular) == 2
    assert RankRule(error=0.0).choose(singular) == 4
    assert RankRule(energy=1.0).choose(singular) == 4
    assert RankRule(error=0.1).choose(torch.zeros(4)) == 1


@pytest.mark.parametrize("rule", [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"energy": 1.5}, {"error": 1.0}])
def test_a_rule_that_says_too_little_or_too_much_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RankRule(**rule)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_of_full_rank_does_what_the_adapter_does(family: str, tmp_path: Path) -> None:
    model = adapted(family, revision="v2")
    conversion = convert_to_lora(model, error=0.0)
    assert conversion.config.revision == "v2"
    conversion.save(tmp_path)
    lora = PeftModel.from_pretrained(tiny_models.build(family), tmp_path).eval()
    assert_close(logits(lora, family), logits(model, family))


@pytest.mark.parametrize(
    ("rule", "uniform_rank"), [({"rank": 3}, False), ({"energy": 0.7}, False), ({"error": 0.4}, True)]
)
def test_the_errors_that_are_reported_are_those_of_the_loaded_lora(
    rule: dict[str, Any], uniform_rank: bool, tmp_path: Path
) -> None:
    model = adapted()
    conversion = convert_to_lora(model, **rule, uniform_rank=uniform_rank)
    conversion.save(tmp_path)
    assert not (uniform_rank and conversion.config.rank_pattern)
    lora = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    wanted, error, total = deltas(model), 0.0, 0.0
    for layer in conversion.layers:
        found = lora.base_model.model.get_submodule(layer.module).get_delta_weight("default").detach()
        difference, norm = float((found - wanted[layer.module]).norm()), float(wanted[layer.module].norm())
        assert layer.error == pytest.approx(difference / norm, rel=1e-3)
        assert layer.norm == pytest.approx(norm, rel=1e-3)
        error, total = error + difference**2, total + norm**2
        assert layer.error <= rule.get("error", 1.0)
        assert 1 - layer.error**2 >= rule.get("energy", 0.0)
    assert conversion.error == pytest.approx((error / total) ** 0.5, rel=1e-3)
    assert conversion.parameters == sum(t.numel() for n, t in conversion.state.items() if ".lora_" in n)


def test_modules_and_biases_that_were_trained_besides_come_along(tmp_path: Path) -> None:
    model = adapted("gpt2", bias="smoa_only", modules_to_save=["ln_f"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            nn.init.normal_(parameter)
    convert_to_lora(model, error=0.0).save(tmp_path)
    lora = PeftModel.from_pretrained(tiny_models.build("gpt2"), tmp_path).eval()
    assert_close(logits(lora, "gpt2"), logits(model, "gpt2"))


def test_an_untrained_adapter_becomes_a_lora_that_does_nothing() -> None:
    conversion = convert_to_lora(adapted(init_weights=True), error=0.1)
    assert conversion.error == 0.0
    assert {layer.rank for layer in conversion.layers} == {1}


# Mixtures of experts.


def adapted_mixture(family: str, **settings: object) -> PeftModel:
    config = SmoaConfig(
        r=4, num_blocks=2, init_weights=False, target_modules=["q_proj"], target_parameters=EXPERTS, **settings
    )
    return get_peft_model(build_mixture(family), config).eval()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for modules only
@pytest.mark.parametrize(("family", "uniform"), [("qwen3_moe", False), ("gpt_oss", True), ("llama4", False)])
def test_a_lora_that_keeps_everything_says_the_same_without_smoa(family: str, uniform: bool, tmp_path: Path) -> None:
    model = adapted_mixture(family)
    conversion = convert_to_lora(model, error=0.0, uniform_rank=uniform)
    conversion.save(tmp_path)
    loaded = PeftModel.from_pretrained(build_mixture(family), str(tmp_path)).eval()
    assert_close(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    assert conversion.error < 1e-5
    assert conversion.parameters == sum(p.numel() for name, p in loaded.named_parameters() if ".lora_" in name)


def test_every_expert_is_cut_and_reported_by_itself() -> None:
    conversion = convert_to_lora(adapted_mixture("qwen3_moe"), rank=2)
    names = [layer.module for layer in conversion.layers]
    assert "model.layers.0.mlp.experts.gate_up_proj[3].1" in names
    assert "model.layers.0.mlp.experts.down_proj[4]" in names
    assert len(names) == 1 + 5 * 3
    assert {layer.rank for layer in conversion.layers} == {2}
    assert conversion.config.rank_pattern == {
        "model.layers.0.mlp.experts.down_proj": 2,
        "model.layers.0.self_attn.q_proj": 2,
    }
    assert 0 < conversion.error < 1


def test_an_adapter_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="other"):
        UpdateSpectra(adapted(), "other")
