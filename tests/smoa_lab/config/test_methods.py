"""Adapters that do not fit the model are refused before training."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import PRESETS, check_adapter, find_method
from smoa_lab.config.run import ModelSection
from tests.support import lab

TARGETS = ["q_proj"]


def config_of(method: str, adapter: dict[str, Any]) -> PeftConfig:
    """The PEFT config of a run."""
    config = find_method(method).peft_config(adapter)
    assert config is not None
    return config


@pytest.fixture
def empty(tmp_path: Path) -> Any:
    """A tiny model without weights."""
    return empty_model(ModelSection(name=str(lab.tiny_base(tmp_path / "base"))))


@pytest.mark.parametrize("method", ["smoa", "lora"])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["q_prj"]}, "adapter: Target modules .*q_prj.* not found"),
        ({"target_modules": []}, "adapter: No `target_modules` passed"),
        ({"target_modules": ".*nowhere"}, "adapter: Target modules .*nowhere not found"),
        ({"target_modules": ["mlp"]}, "adapter: .*LlamaMLP"),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, "adapter: All modules were excluded"),
        ({"target_modules": TARGETS, "layers_to_transform": [9]}, "adapter: Target modules .*layers_to_transform"),
        ({"target_modules": TARGETS, "inference_mode": True}, "adapter: trains nothing; leave inference_mode out"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_without_its_weights(
    method: str, adapter: dict[str, Any], message: str, empty: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(empty, config_of(method, adapter))


@pytest.mark.parametrize(
    ("method", "adapter", "message"),
    [
        ("vera", {"target_modules": TARGETS, "r": 0}, "adapter: float division by zero"),
    ],
)
def test_what_other_methods_would_fail_at_after_training_is_refused(
    method: str, adapter: dict[str, Any], message: str, empty: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(empty, config_of(method, adapter))


@pytest.mark.parametrize("method", [name for name in PRESETS if name != "full"])
def test_an_adapter_of_each_preset_that_fits_is_taken(method: str, empty: Any) -> None:
    check_adapter(empty, config_of(method, {"target_modules": ["self_attn.q_proj"]}))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_an_adapter_that_starts_from_the_weights_is_counted_without_them(empty: Any) -> None:
    settings = {"target_modules": TARGETS, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    check_adapter(empty, config_of("lora", settings))
