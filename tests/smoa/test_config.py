"""A config: values that are refused, each by its name, and what the others mean."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig

from smoa import ConfigError, SmoaConfig
from tests import oracle

WRONG: dict[str, list[Any]] = {
    "r": [0, -3],
    "num_blocks": [0, 256],
    "bias": [None, 1, "lora_only"],
    "partition": [None, 1, "fourier"],
    "modulation": [None, 1, "sum", "noise"],
    "scale": [1, "rms"],
    "init_weights": [None, "gaussian", 2],
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_value_that_there_is_not_is_refused_by_its_name(setting: str) -> None:
    for value in WRONG[setting]:
        with pytest.raises(ConfigError, match=rf"SmoaConfig: .*{setting}={value!r}"):
            SmoaConfig(**{setting: value})


@pytest.mark.filterwarnings("error")
def test_a_rank_below_the_number_of_blocks_is_taken_without_a_warning() -> None:
    assert SmoaConfig(r=2, num_blocks=4).ranks_of() == (1, 1, 0, 0)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.(self_attn|mlp)\.(q|v)_proj",
        "|".join(f"layers.{i}.up" for i in range(500)),
        "(.+)+x",
        r"^(?!.*vision).*layers\.(1?\d|2[0-3])\.(self_attn|mlp)\.(k|up)_proj",
    ],
)
def test_an_ordinary_expression_is_accepted(pattern: str) -> None:
    SmoaConfig(target_modules=pattern, rank_pattern={pattern: 3})


@pytest.mark.parametrize("setting", [{"layers_to_transform": [0]}, {"layers_to_transform": [0], "layers_pattern": "h"}])
def test_choosing_layers_by_index_needs_a_list_of_module_names(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        SmoaConfig(target_modules="q_proj", **setting)


def test_loras_names_of_settings_are_taken() -> None:
    config = SmoaConfig(r=8, lora_alpha=16, lora_dropout=0.05)
    assert (config.alpha, config.smoa_dropout) == (16, 0.05)
    assert "lora_alpha" not in config.to_dict()


@pytest.mark.parametrize(("r", "num_blocks"), [(8, 2), (64, 8)])
def test_rank_stabilized_scaling_is_loras_at_equal_parameters(r: int, num_blocks: int) -> None:
    rank_of_lora = r / num_blocks
    config = SmoaConfig(r=r, num_blocks=num_blocks, alpha=16, use_rslora=True)
    assert config.alpha_of("layer", r) / r == pytest.approx(16 / rank_of_lora**0.5)
    left_out = SmoaConfig(r=r, num_blocks=num_blocks, use_rslora=True)
    assert left_out.alpha_of("layer", r) / r == pytest.approx(rank_of_lora / rank_of_lora**0.5)


def test_a_file_says_its_format_and_one_of_a_newer_smoa_is_refused(tmp_path: Path) -> None:
    SmoaConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["smoa_format"] == 1
    for older in (saved | {"smoa_format": 0}, {key: saved[key] for key in saved if key != "smoa_format"}):
        file.write_text(json.dumps(older))
        assert PeftConfig.from_pretrained(tmp_path).to_dict()["smoa_format"] == 1
    file.write_text(json.dumps(saved | {"smoa_format": 2}))
    with pytest.raises(ConfigError, match=r"newer smoa.*: pip install -U smoa$"):
        SmoaConfig.from_pretrained(tmp_path)


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
    expected = tuple(oracle.block_ranks(r, num_blocks)[: min(shape)])
    own = config.rank_of("layer", shape)
    assert config.ranks_of("layer", shape=shape) == expected
    assert own == sum(expected)
    assert config.num_blocks_of("layer", shape) == len(expected)
    assert config.alpha_of("layer", own, shape) / own == pytest.approx(alpha / r, rel=1e-14)
    assert SmoaConfig(r=r, num_blocks=num_blocks).alpha_of("layer", own, shape) == own


def test_a_named_module_keeps_its_number_of_blocks_in_a_narrow_layer() -> None:
    config = SmoaConfig(r=8, num_blocks=2, num_blocks_pattern={"head": 4})
    assert config.num_blocks_of("head", (1, 9)) == len(config.ranks_of("head", shape=(1, 9))) == 4
    assert config.rank_of("head", (1, 9)) == 8
