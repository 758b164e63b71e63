"""Quantized models, through layers/quantized.py and tuner/model.py: several adapters, merges, saves, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import SmoaConfig, UnsupportedModuleError, merged, scores
from smoa.quantized import QuantizedLinear
from tests.support import tiny
from tests.support.layers import (
    assert_close,
    delta_of,
    labels,
    layers_of,
    oracle_delta,
    randomise,
    same_layout_on_every_cpu,
    stored_bits,
)
from tests.support.tiny import quantized_model


@pytest.fixture(autouse=True)
def _one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests compare on every CPU alike."""
    same_layout_on_every_cpu(monkeypatch)


def adapted_model(base: nn.Module, **config: Any) -> PeftModel:
    settings = {"r": 4, "num_blocks": 2, "alpha": 8, "target_modules": "all-linear"} | config
    model = get_peft_model(base, SmoaConfig(**settings))
    for layer in layers_of(model):
        assert isinstance(layer, QuantizedLinear)
        randomise(layer)
    return model


@pytest.fixture
def two_adapters(tmp_path: Path) -> PeftModel:
    """An NF4 model with the adapters `default` and `other`, of another K."""
    model = adapted_model(quantized_model(tmp_path / "base"))
    model.add_adapter("other", SmoaConfig(r=6, num_blocks=3, target_modules="all-linear"))
    for layer in layers_of(model):
        randomise(layer, "other")
    return model.eval()


def test_a_mixed_batch_gives_each_sample_its_adapter(two_adapters: PeftModel) -> None:
    inputs = {key: value for key, value in tiny.batch("llama").items() if key != "labels"}
    alone = []
    with torch.no_grad():
        for row, name in enumerate(("default", "other")):
            two_adapters.set_adapter(name)
            alone.append(two_adapters(**inputs).logits[row])
        with two_adapters.disable_adapter():
            alone.append(two_adapters(**inputs).logits[2])
        mixed = two_adapters(**inputs, adapter_names=["default", "other", "__base__"]).logits
    assert_close(mixed, torch.stack(alone))


def test_every_merged_adapter_is_anchored_on_the_pristine_weight(two_adapters: PeftModel) -> None:
    layer = layers_of(two_adapters)[0]
    deltas = [delta_of(layer), delta_of(layer, "other")]
    before = stored_bits(layer.get_base_layer())
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following"):
        layer.merge(adapter_names=["other"])
    for name, delta in zip(("default", "other"), deltas, strict=True):
        assert_close(layer.delta(name), delta, torch.float32)
    together = layer.base_weight()
    layer.unmerge()
    layer.merge(adapter_names=["default", "other"])
    assert torch.equal(layer.base_weight(), together)
    layer.unmerge()
    assert stored_bits(layer.get_base_layer()) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merge_is_undone_byte_for_byte(tmp_path: Path, bits: int) -> None:
    model = adapted_model(quantized_model(tmp_path, **{f"load_in_{bits}bit": True})).eval()
    before = stored_bits(model)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert stored_bits(model) == before
    with pytest.raises(UnsupportedModuleError, match=r"is quantized; .*lossy=True"), merged(model):
        pass
    with merged(model, lossy=True):
        assert all(layer.merged for layer in layers_of(model))
    assert stored_bits(model) == before


@pytest.mark.parametrize("options", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_an_adapter_moves_to_a_full_precision_base_and_back(
    tmp_path: Path, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = adapted_model(quantized_model(tmp_path / "base", **options)).eval()
    expected = trained(**tiny.batch("llama")).logits
    trained.peft_config["default"].other_base = not options  # 4 bits change so small a block by up to 28 %
    trained.save_pretrained(tmp_path / "adapter")

    def decompose(weight: Tensor) -> None:
        raise AssertionError("a loaded adapter decomposes nothing")

    monkeypatch.setattr(scores, "spectral_scores", decompose)
    scores.clear_spectrum_cache()
    full = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "adapter")
    for ours, theirs in zip(layers_of(full), layers_of(trained), strict=True):
        assert labels(ours) == labels(theirs)
        assert_close(ours.delta("default"), oracle_delta(theirs, weight=ours.base_weight()), torch.float32)
    full.save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(quantized_model(tmp_path / "base", **options), tmp_path / "back").eval()
    assert torch.equal(back(**tiny.batch("llama")).logits, expected)
    base = quantized_model(tmp_path / "base", **options)
    on_meta = PeftModel.from_pretrained(base, tmp_path / "back", low_cpu_mem_usage=True).eval()
    assert torch.equal(on_meta(**tiny.batch("llama")).logits, expected)


def test_the_projections_of_gpt2_are_quantized_and_adapted_too(tmp_path: Path) -> None:
    model = adapted_model(quantized_model(tmp_path, "gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    layer = layers_of(model)[0]
    x = torch.randn(5, layer.in_features)
    assert_close(layer(x) - layer.base_layer(x), x.double() @ delta_of(layer).T, torch.float32)
