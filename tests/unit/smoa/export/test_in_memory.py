"""What is refused, and what is left of quantization, where a model is merged in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from smoa import MergeError, SmoaConfig
from smoa.export.in_memory import merge_in_memory, with_plain_weights
from smoa.layers.linear import Linear
from tests.support import tiny_models


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter of the tiny Llama."""
    config = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules=["q_proj"])
    get_peft_model(tiny_models.build("llama"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("error", [ValueError("NaN in the weights"), NotImplementedError("no merging of this kind")])
def test_a_layer_that_cannot_be_merged_is_named(
    error: Exception, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Linear, *arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Linear, "merge", refuse)
    with pytest.raises(MergeError, match=rf"layers\.0\.self_attn\.q_proj: {error}"):
        merge_in_memory(tiny_models.build("llama"), adapter, adapter.with_name("merged"), torch.float32, "5GB")
    assert not adapter.with_name("merged").exists()


def test_a_base_that_cannot_be_dequantized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PreTrainedModel, dtype: torch.dtype) -> None:
        raise NotImplementedError("no way back")

    model = tiny_models.build("llama")
    model.hf_quantizer = object()
    monkeypatch.setattr(PreTrainedModel, "dequantize", refuse)
    with pytest.raises(MergeError, match=r"can't be dequantized \(no way back\); give a base that isn't quantized"):
        with_plain_weights(model)


def test_a_dequantized_base_is_not_saved_as_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", torch.bfloat16)
    model.hf_quantizer = model.config.quantization_config = object()
    monkeypatch.setattr(PreTrainedModel, "dequantize", lambda self, dtype: self)
    plain = with_plain_weights(model)
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")


def test_a_base_that_was_never_quantized_is_only_widened() -> None:
    model = tiny_models.build("llama", torch.bfloat16)
    assert with_plain_weights(model) is model
    assert model.dtype == torch.float32
