from __future__ import annotations

from typing import Any

import pytest

from smoa.errors import ConfigError
from smoa_lab.config.run_config import check_config


@pytest.fixture
def config() -> dict[str, Any]:
    """A run on a model in NF4."""
    options = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    return {
        "model": {"name": "base", "options": options},
        "data": {"tasks": ["arc_easy"]},
        "training": {"use_cpu": True},
    }


def test_a_quantization_that_transformers_knows_is_fine(config: dict[str, Any]) -> None:
    assert check_config(config).model.options == config["model"]["options"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"model\.options\.dtype: set model\.dtype instead"),
        ({"trust_remote_code": True}, r"model\.options\.trust_remote_code: set model\.trust_remote_code instead"),
        ({"load_in_4bit": True}, r"model\.options\.load_in_4bit: belongs one level deeper, in .*quantization_config"),
        (
            {"quantization_config": True},
            r"quantization_config: must be a block of keys, such as load_in_4bit: true; got True",
        ),
        ({"quantization_config": {"load_in_3bit": True}}, r"quantization_config: .*no `quant_method`"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quantype": "nf4"}},
            r"quantization_config\.bnb_4bit_quantype: there is no such key; did you mean 'bnb_4bit_quant_type'\?",
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bflot16"}},
            r"quantization_config: .*bflot16",
        ),
    ],
)
def test_a_mistaken_quantization_is_told_before_anything_is_loaded(
    config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config["model"]["options"] = options
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_what_can_not_be_combined_with_a_quantization_is_told(config: dict[str, Any]) -> None:
    config["model"]["name"] = "model.gguf"
    with pytest.raises(ConfigError, match="a GGUF file is dequantized when loaded"):
        check_config(config)
    config["model"]["name"], config["method"], config["adapter"] = "base", "full", {}
    with pytest.raises(ConfigError, match="full trains the weights, and quantized weights cannot be trained"):
        check_config(config)
