"""`smoa train` on a base model in 4 and 8 bits: what the YAML asks for is what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel

from smoa.errors import ConfigError, DataError
from smoa.layers.quantized import QuantizedLinear
from smoa_lab.config.run_config import check_config, load_config
from smoa_lab.runs.evaluate_run import evaluate_run
from smoa_lab.training import train_run
from smoa_lab.training.base_models import ModelSource, load_base_model
from smoa_lab.training.run_folder import RunFolder
from tests.support import lab

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
INT8 = {"load_in_8bit": True}


@pytest.fixture(autouse=True)
def _one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks what it evaluates, and can't where a layer is as narrow as here."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of four steps on an NF4 model."""
    config = lab.tiny_run(
        tmp_path,
        monkeypatch,
        train=40,
        test=6,
        training=lab.steps(4, learning_rate=0.01),
        adapter={"r": 4, "num_blocks": 2, "alpha": 128, "target_modules": "all-linear"},
        data={"tasks": ["arc_easy"], "train_examples": 16, "validation_examples": 2},
    )
    config["model"]["options"] = {"quantization_config": NF4}
    return config


@pytest.mark.parametrize(("quantisation", "kind"), [(NF4, bnb.nn.Linear4bit), (INT8, bnb.nn.Linear8bitLt)])
def test_a_run_trains_on_the_quantised_model_and_is_scored_again_from_its_folder(
    config: dict[str, Any], quantisation: dict[str, Any], kind: type
) -> None:
    config["model"]["options"]["quantization_config"] = quantisation
    run = check_config(config)
    ready = train_run.prepare(run)
    metrics = train_run.train(run, ready)
    adapted = [module for module in ready.base.modules() if isinstance(module, QuantizedLinear)]
    assert adapted
    assert all(type(layer.get_base_layer()) is kind for layer in adapted)
    assert all(layer.smoa_B["default"].weight.any() for layer in adapted)
    assert metrics["evaluation"]["after"]["all"] != metrics["evaluation"]["before"]["all"]
    again = evaluate_run(load_config(RunFolder(run.folder).config), RunFolder(run.folder).adapter)
    assert again["scores"]["all"] == pytest.approx(metrics["evaluation"]["after"]["all"], rel=1e-5)


def test_packed_weights_count_whole(config: dict[str, Any]) -> None:
    packed, _ = train_run.load_model(check_config(config))
    plain, _ = load_base_model(ModelSource(config["model"]["name"]))
    assert train_run._parameters(packed)["total"] == train_run._parameters(plain)["total"]


def test_the_adapter_of_a_quantised_run_fits_the_full_model(config: dict[str, Any]) -> None:
    run = check_config(config)
    train_run.train(run)
    base, _ = load_base_model(ModelSource(config["model"]["name"]))
    model = PeftModel.from_pretrained(base, str(RunFolder(run.folder).adapter))
    merged = model.merge_and_unload(safe_merge=True)  # warnings are errors here: nothing is rounded
    assert torch.isfinite(merged.lm_head.weight).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
def test_a_mistaken_quantisation_is_told_before_anything_is_loaded(
    config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config["model"]["options"] = options
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_what_can_not_be_combined_with_a_quantisation_is_told(config: dict[str, Any]) -> None:
    config["model"]["name"] = "model.gguf"
    with pytest.raises(ConfigError, match="a GGUF file is dequantized when loaded"):
        check_config(config)
    config["model"]["name"], config["method"], config["adapter"] = "base", "full", {}
    with pytest.raises(ConfigError, match="full trains the weights, and quantized weights cannot be trained"):
        check_config(config)


def test_an_option_that_transformers_does_not_know_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"model\.options: cannot load .*load_in_5bit"):
        load_base_model(ModelSource(config["model"]["name"], options={"load_in_5bit": True}))
