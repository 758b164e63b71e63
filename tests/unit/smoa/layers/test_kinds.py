from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from smoa.layers.kinds import kind_of
from tests.support.kinds import input_of
from tests.support.layers import Wrapper, adapted_layer
from tests.support.tolerance import assert_close


def pruned() -> nn.Module:
    layer = nn.Linear(6, 8)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(6, 8)),
        lambda: parametrizations.spectral_norm(nn.Conv1d(6, 8, 2)),
        lambda: weight_norm(nn.Linear(6, 8)),
        pruned,
    ],
)
def test_a_layer_whose_weight_is_computed_is_refused(make: Callable[[], nn.Module]) -> None:
    base = make()
    refusal = kind_of(base).refusal(base)
    assert refusal is not None
    assert "computed from others" in refusal


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Positions(nn.Embedding):
    """Looks up places and not its input, as positional embeddings of transformers do."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[-1]))


class Standardized(nn.Conv2d):
    """Computes with another weight than the one that it holds."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Inherited(Doubled):
    pass


@pytest.mark.parametrize(
    ("base", "owner"),
    [
        (Inherited(6, 8), "Doubled"),
        (Positions(17, 10), "Positions"),
        (Standardized(4, 4, 3), "Standardized"),
        (T5Gemma2TextScaledWordEmbedding(16, 8, 0, embed_scale=2.0, eoi_token_index=5), "T5Gemma2"),
        (Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4)), "Llama4Router"),
    ],
)
def test_a_layer_whose_class_computes_something_else_is_refused(base: nn.Module, owner: str) -> None:
    refusal = kind_of(base).refusal(base)
    assert refusal is not None
    assert refusal.startswith(owner)


def hooked() -> nn.Module:
    """As accelerate's offloading leaves a layer: with a forward of this one layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    add_hook_to_module(layer, ModelHook())
    assert "forward" in vars(layer)
    return layer


def sharded() -> nn.Module:
    """Of the class that FSDP2 makes for a layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return layer


def patched() -> nn.Module:
    """As Unsloth changes layers: one at a time, by a function that computes the same."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("make", [hooked, sharded, patched, lambda: FalconLinear(13, 11, dtype=torch.float64)])
def test_a_layer_that_computes_the_same_in_another_way_is_adapted(make: Callable[[], nn.Module]) -> None:
    layer = adapted_layer(make(), r=6, num_blocks=3)
    x = input_of("linear")
    unmerged = layer(x)
    assert (unmerged - layer.get_base_layer()(x)).abs().max() > 1e-3
    layer.merge()
    assert_close(layer(x), unmerged)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_layer_that_torchao_computes_in_float8_is_adapted() -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = convert_to_float8_training(Wrapper(nn.Linear(32, 32)), config=Float8LinearConfig(emulate=True))
    layer = adapted_layer(model.layer, r=6, num_blocks=3)
    x = torch.randn(16, 32)
    assert_close(layer(x), model.layer(x) + layer.branch_output(x, "default"))
