from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from smoa import ConfigError
from smoa.integrations.lora_settings import check_settings, smoa_config


def test_what_both_methods_have_is_taken_over() -> None:
    lora = LoraConfig(
        r=12,
        lora_alpha=96,
        lora_dropout=0.25,
        bias="lora_only",
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score"],
        layers_to_transform=[1],
        use_rslora=True,
        rank_pattern={"q_proj": 8},
        alpha_pattern={"q_proj": 3.0},
        task_type="SEQ_CLS",
    )
    config = smoa_config(lora, {}, "here")
    assert (config.r, config.alpha, config.smoa_dropout, config.bias) == (12, 96, 0.25, "smoa_only")
    assert config.use_rslora
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["score"])
    assert (config.layers_to_transform, config.rank_pattern) == ([1], {"q_proj": 8})
    assert (config.alpha_pattern, config.task_type, config.peft_type) == ({"q_proj": 3.0}, "SEQ_CLS", "SMOA")


def test_the_block_adds_and_wins() -> None:
    config = smoa_config(LoraConfig(r=8, lora_alpha=16), {"num_blocks": 4, "alpha": 512, "scale": "layer"}, "here")
    assert (config.r, config.num_blocks, config.alpha, config.scale) == (8, 4, 512, "layer")


def test_the_block_may_use_loras_names() -> None:
    block = {"lora_alpha": 64, "lora_dropout": 0.5}
    config = smoa_config(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1), block, "here")
    assert (config.r, config.alpha, config.smoa_dropout) == (8, 64, 0.5)


def test_a_value_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^here: .*lora_alpha"):
        check_settings({"alpha": 8, "lora_alpha": 64}, "here")


def test_settings_that_the_framework_leaves_unset_have_smoas_defaults() -> None:
    lora = LoraConfig()
    lora.r = lora.lora_alpha = None  # type: ignore[assignment]  # as axolotl passes them
    config = smoa_config(lora, {}, "here")
    assert (config.r, config.alpha) == (16, None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [(0, 1)], "use_dora": True}, "layer_replication, use_dora"),
    ],
)
def test_what_only_lora_has_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^file.yaml: {named}: a setting of LoRA that SMoA does not have; remove it"):
        smoa_config(LoraConfig(**changed), {}, "file.yaml")


def test_an_empty_list_or_mapping_counts_as_unset() -> None:
    smoa_config(LoraConfig(layer_replication=[], loftq_config={}), {}, "here")


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^file.yaml: num_blok: SmoaConfig has no such setting"):
        check_settings({"num_blok": 4}, "file.yaml")


def test_a_wrong_value_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^file.yaml: SmoaConfig: num_blocks=0"):
        check_settings({"num_blocks": 0}, "file.yaml")
