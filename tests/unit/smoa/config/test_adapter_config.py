"""A config that breaks a rule is refused; any other is saved and read as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig

from smoa import (
    ConfigError,
    SmoaConfig,
)
from tests import reference
from tests.support.adapted_models import QV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r=0\b"),
        ({"r": -3}, r"r=-3\b"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"r": True}, r"r=True"),
        ({"r": "8"}, r"r='8'"),
        ({"num_blocks": 0}, r"num_blocks=0\b"),
        ({"num_blocks": -1}, r"num_blocks=-1\b"),
        ({"num_blocks": 256}, r"num_blocks=256\b.*255"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [8]}, r"block_ranks=\[8\].*num_blocks=2"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [4, 2, 2]}, r"block_ranks=\[4, 2, 2\].*num_blocks=2"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [4, 5]}, r"block_ranks=\[4, 5\].*9.*r=8"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [9, -1]}, r"block_ranks\[1\]=-1 must be a non-negative"),
        ({"r": 8, "num_blocks": 2, "block_ranks": [7.5, 0.5]}, r"block_ranks=\[7\.5, 0\.5\]"),
        ({"r": 8, "num_blocks": 2, "block_ranks": 8}, r"block_ranks"),
        ({"alpha": 0}, r"alpha=0\b"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"alpha": float("inf")}, r"alpha=inf"),
        ({"smoa_dropout": 1.0}, r"smoa_dropout=1\.0"),
        ({"smoa_dropout": -0.1}, r"smoa_dropout=-0\.1"),
        ({"partition": "fourier"}, r"partition='fourier'.*spectral.*contiguous.*random"),
        ({"modulation": "sum"}, r"modulation='sum'.*hadamard.*none"),
        ({"bias": "lora_only"}, r"bias='lora_only'.*none.*all.*smoa_only"),
        ({"init_weights": "gaussian"}, r"init_weights='gaussian'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"alpha_pattern": {"q_proj": -2}}, r"alpha_pattern\['q_proj'\]=-2"),
        ({"rank_pattern": {"q_proj": 4}, "r": 2, "block_ranks": [1, 1]}, r"block_ranks.*rank_pattern"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SmoaConfig(**settings)


def test_every_problem_of_a_config_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"r=0.*num_blocks=0.*smoa_dropout=2.*"):
        SmoaConfig(r=0, num_blocks=0, smoa_dropout=2)


@pytest.mark.parametrize("setting", [{"layers_to_transform": [0]}, {"layers_to_transform": [0], "layers_pattern": "h"}])
def test_choosing_layers_by_index_needs_a_list_of_module_names(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        SmoaConfig(target_modules="q_proj", **setting)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="number_of_blocks"):
        SmoaConfig(number_of_blocks=4)


def test_a_saved_config_read_as_json_is_what_was_saved(tmp_path: Path) -> None:
    config = SmoaConfig(r=4, alpha=3.0, rank_pattern={"up": 2})
    config.save_pretrained(tmp_path)
    read = SmoaConfig.from_json_file(str(tmp_path / "adapter_config.json"))
    assert read == config.to_dict() | {"save_id": config.make_save_id()}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": frozenset(QV), "exclude_modules": {"lm_head"}},
        {"target_modules": QV, "layers_to_transform": range(1), "layers_pattern": {"layers"}},
        {"target_modules": QV, "modules_to_save": {"lm_head"}, "trainable_token_indices": {"embed_tokens": {3, 1}}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_collection_that_is_taken_can_be_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    config = SmoaConfig(r=4, **settings)
    config.save_pretrained(tmp_path)
    again = SmoaConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in settings} == {name: getattr(config, name) for name in settings}


def test_loras_names_of_settings_are_taken() -> None:
    config = SmoaConfig(r=8, lora_alpha=16, lora_dropout=0.05)
    assert (config.alpha, config.smoa_dropout) == (16, 0.05)
    assert SmoaConfig(r=8, alpha=16, lora_alpha=16).alpha == 16
    assert "lora_alpha" not in config.to_dict()


def test_two_values_for_one_setting_are_refused() -> None:
    with pytest.raises(ConfigError, match="alpha=8 and lora_alpha=16 name the same setting; drop lora_alpha"):
        SmoaConfig(alpha=8, lora_alpha=16)


@pytest.mark.parametrize(("r", "num_blocks"), [(8, 2), (64, 8)])
def test_rank_stabilized_scaling_is_loras_at_equal_parameters(r: int, num_blocks: int) -> None:
    rank_of_lora = r / num_blocks
    config = SmoaConfig(r=r, num_blocks=num_blocks, alpha=16, use_rslora=True)
    assert config.alpha_of("layer", r) / r == pytest.approx(16 / rank_of_lora**0.5)
    left_out = SmoaConfig(r=r, num_blocks=num_blocks, use_rslora=True)
    assert left_out.alpha_of("layer", r) / r == pytest.approx(rank_of_lora / rank_of_lora**0.5)


def test_the_scale_is_loras() -> None:
    assert SmoaConfig().scale == SmoaConfig(scale=None).scale == "lora"


def test_removed_settings_in_a_file_are_ignored_with_one_warning(tmp_path: Path) -> None:
    SmoaConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    removed = {"normalize_anchor": False, "normalized_alpha": {}, "weights_digest": "a"}
    file.write_text(json.dumps(json.loads(file.read_text()) | removed))
    with pytest.warns(UserWarning, match="normalize_anchor.*normalized_alpha.*weights_digest") as warned:
        assert PeftConfig.from_pretrained(tmp_path).r == 4
    assert len(warned) == 1


@given(
    r=st.integers(1, 100),
    num_blocks=st.integers(1, 40),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    alpha=st.floats(0.01, 1e4),
)
def test_a_narrow_layer_keeps_the_ranks_of_its_blocks_and_alpha_over_r(
    r: int, num_blocks: int, shape: tuple[int, int], alpha: float
) -> None:
    config = SmoaConfig(r=r, num_blocks=num_blocks, alpha=alpha)
    expected = tuple(reference.block_ranks(r, num_blocks)[: min(shape)])
    own = config.rank_of("layer", shape)
    assert config.ranks_of("layer", shape=shape) == config.ranks_of("layer", own, shape) == expected
    assert own == sum(expected)
    assert config.num_blocks_of("layer", shape) == len(expected)
    assert config.alpha_of("layer", own, shape) / own == pytest.approx(alpha / r, rel=1e-14)
    assert SmoaConfig(r=r, num_blocks=num_blocks).alpha_of("layer", own, shape) == own


def test_block_ranks_and_a_named_module_keep_their_number_of_blocks_in_a_narrow_layer() -> None:
    fixed = SmoaConfig(r=8, num_blocks=2, block_ranks=[5, 3])
    named = SmoaConfig(r=8, num_blocks=2, num_blocks_pattern={"head": 4})
    for config, num_blocks in ((fixed, 2), (named, 4)):
        assert config.num_blocks_of("head", (1, 9)) == len(config.ranks_of("head", shape=(1, 9))) == num_blocks
        assert config.rank_of("head", (1, 9)) == 8
