"""Modules that cannot be adapted are refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa import PartitionError, SmoaConfig, SmoaError, UnsupportedModuleError
from tests.support.layers import Wrapper


@pytest.mark.parametrize("partition", ["spectral", "contiguous", "random"])
def test_more_blocks_than_a_layer_has_coordinates_are_refused_by_name(
    tiny_llama: PreTrainedModel, partition: str
) -> None:
    before = {name: type(module) for name, module in tiny_llama.named_modules()}
    config = SmoaConfig(r=32, num_blocks=20, partition=partition, target_modules=["q_proj", "v_proj"])
    with pytest.raises(PartitionError, match=r"layers\.0\.self_attn\.v_proj.*num_blocks=20.*16"):
        get_peft_model(tiny_llama, config)
    assert {name: type(module) for name, module in tiny_llama.named_modules()} == before


SUPPORTED = r"torch\.nn\.Linear.*Conv1D"


class OddModel(nn.Module):
    """Modules of many kinds, some of which other PEFT methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(8, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.conv3 = nn.Conv3d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.lazy = nn.LazyLinear(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("target", ["embedding", "conv1", "conv2", "conv3", "attention", "norm", "bilinear"])
def test_an_unsupported_module_is_refused_by_name_with_what_is_supported(target: str) -> None:
    model = OddModel()
    with pytest.raises(UnsupportedModuleError, match=rf"{target}\b.*{SUPPORTED}"):
        get_peft_model(model, SmoaConfig(r=4, target_modules=[target, "linear"]))
    assert type(model.linear) is nn.Linear


def test_every_unsupported_module_is_told_at_once() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"embedding.*conv1"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["embedding", "conv1"]))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_linear_layer_without_a_weight_yet_is_refused_by_name() -> None:
    with pytest.raises(SmoaError, match="lazy"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["lazy"]))


def test_an_embedding_of_a_language_model_is_refused_by_name(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModuleError, match=rf"embed_tokens.*Embedding.*{SUPPORTED}"):
        get_peft_model(tiny_llama, SmoaConfig(r=4, target_modules=["embed_tokens"]))


class QuantizedLinear(nn.Linear):
    """As bitsandbytes has it: a Linear whose weight holds integers."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)


def test_a_quantized_layer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"layer: .*quantized weight of a .*QuantizedLinear"):
        get_peft_model(Wrapper(QuantizedLinear(8, 8)), SmoaConfig(target_modules=["layer"]))
