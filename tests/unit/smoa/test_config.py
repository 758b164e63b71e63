"""A config: values that are refused, each by its name, and what the others mean."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig

from smoa import ConfigError, SmoaConfig
from tests import reference

WRONG: dict[str, list[Any]] = {
    "target_modules": [3, {"a": 1}, [1], "(", True],
    "target_parameters": ["experts.down_proj", [1], {"a": 1}],
    "smoa_format": [-1, "1", 0.5, None, True],
    "exclude_modules": [3, [None], "["],
    "modules_to_save": ["head", 1, [2]],
    "layers_to_transform": ["x", -1, [-1], 1.5, True],
    "layers_pattern": [1, [1], "("],
    "rank_pattern": [None, 1, [1], {"(": 2}, {"a": "b"}, {"a": 0}],
    "alpha_pattern": [None, 1, {"a": None}, {"a": -1}],
    "fan_in_fan_out": [None, "yes", 1],
    "inference_mode": [None, 0],
    "trainable_token_indices": [1, "x", ["a"], {"a": 1}, [-3]],
    "base_model_name_or_path": [1, []],
    "revision": [1],
    "auto_mapping": [1, "x"],
    "r": [None, "4", 4.0, True, 0, -3],
    "num_blocks": [None, "2", 0, 256],
    "alpha": ["1", float("nan"), float("inf"), 0, -1.0, []],
    "smoa_dropout": [None, "0", 1, -0.1, []],
    "bias": [None, 1, ["none"], "lora_only"],
    "partition": [None, 1, ["spectral"], "fourier"],
    "modulation": [None, 1, "sum", "noise"],
    "scale": [1, "rms"],
    "use_rslora": [None, 1, "yes"],
    "lora_alpha": ["1", float("nan"), 0],
    "lora_dropout": ["0", 1, []],
    "init_weights": [None, "gaussian", 2],
    "num_blocks_pattern": [None, 1, [1], {"(": 2}, {"a": "b"}, {"a": 256}],
    "ensure_weight_tying": [None, "yes", 1],
    "other_base": [None, "yes", 1],
    "quantized_base": [None, "yes", 1],
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_value_of_a_wrong_type_is_refused_by_its_name_and_file(setting: str, tmp_path: Path) -> None:
    for value in WRONG[setting]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SMOA", setting: value}))
        with pytest.raises(ConfigError, match=rf"adapter_config\.json: SmoaConfig: {setting}"):
            SmoaConfig.from_pretrained(tmp_path)


def test_all_problems_are_told_together() -> None:
    with pytest.raises(
        ConfigError, match=r"r='4' .*; num_blocks=0 .*; target_modules: '\(' .*; rank_pattern\['a'\]=0 "
    ):
        SmoaConfig(r="4", num_blocks=0, target_modules="(", rank_pattern={"a": 0})  # type: ignore[arg-type]


def test_what_json_lacks_is_accepted_and_saved(tmp_path: Path) -> None:
    tokens: Any = {"embed_tokens": {3, 1}}
    config = SmoaConfig(target_modules={"a"}, layers_to_transform=range(2), trainable_token_indices=tokens)  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    again = SmoaConfig.from_pretrained(tmp_path)
    assert (again.target_modules, again.layers_to_transform) == ({"a"}, [0, 1])
    assert again.trainable_token_indices == config.trainable_token_indices


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(" * 2000])
def test_an_expression_that_python_can_not_read_is_refused(pattern: str) -> None:
    for name, value in (("target_modules", pattern), ("rank_pattern", {pattern: 2}), ("layers_pattern", [pattern])):
        with pytest.raises(ConfigError, match=f"{name}: .* is not a regular expression"):
            SmoaConfig(**{name: value})
    with pytest.raises(ConfigError, match=r"num_blocks_pattern: .*is not a regular expression"):
        SmoaConfig(num_blocks_pattern={"(?i)up": 2})  # which PEFT could not use as a pattern


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


def test_every_setting_has_wrong_values_in_this_test() -> None:
    others = {"task_type", "peft_type", "peft_version"}
    assert set(SmoaConfig.__dataclass_fields__) - others == set(WRONG)


@pytest.mark.parametrize("setting", [{"layers_to_transform": [0]}, {"layers_to_transform": [0], "layers_pattern": "h"}])
def test_choosing_layers_by_index_needs_a_list_of_module_names(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        SmoaConfig(target_modules="q_proj", **setting)


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


def test_a_file_says_its_format_and_one_of_a_newer_smoa_is_refused(tmp_path: Path) -> None:
    SmoaConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["smoa_format"] == 1
    for older in (saved | {"smoa_format": 0}, {key: saved[key] for key in saved if key != "smoa_format"}):
        file.write_text(json.dumps(older))
        assert PeftConfig.from_pretrained(tmp_path).to_dict()["smoa_format"] == 1
    file.write_text(json.dumps(saved | {"smoa_format": 2, "r": "many"}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*newer smoa.*: pip install -U smoa$"):
        SmoaConfig.from_pretrained(tmp_path)


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
    assert config.ranks_of("layer", shape=shape) == expected
    assert own == sum(expected)
    assert config.num_blocks_of("layer", shape) == len(expected)
    assert config.alpha_of("layer", own, shape) / own == pytest.approx(alpha / r, rel=1e-14)
    assert SmoaConfig(r=r, num_blocks=num_blocks).alpha_of("layer", own, shape) == own


def test_a_named_module_keeps_its_number_of_blocks_in_a_narrow_layer() -> None:
    config = SmoaConfig(r=8, num_blocks=2, num_blocks_pattern={"head": 4})
    assert config.num_blocks_of("head", (1, 9)) == len(config.ranks_of("head", shape=(1, 9))) == 4
    assert config.rank_of("head", (1, 9)) == 8
