"""Small layers of each kind, inputs for them, and what the oracle says that they give."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoa.layer import SmoaLayer
from tests import oracle
from tests.support.layers import base_layer, base_weight, oracle_delta

CONVS: dict[str, dict[str, Any]] = {
    "conv1d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv1d_same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "conv1d_valid": {"kernel_size": 2, "padding": "valid", "bias": False},
    "conv2d": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "conv2d_1x1": {"kernel_size": 1},
    "conv2d_groups": {"kernel_size": 2, "groups": 2},
    "conv2d_depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "conv2d_reflect": {"kernel_size": (2, 3), "padding": (1, 2), "padding_mode": "reflect"},
    "conv2d_replicate": {"kernel_size": 2, "padding": 2, "padding_mode": "replicate"},
    "conv2d_circular": {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
    "conv3d": {"kernel_size": (2, 1, 2), "stride": (1, 2, 1), "padding": (0, 1, 1)},
}
"""Four channels to eight, in one to three dimensions, with every way of moving and padding a kernel."""
KINDS = ("linear", "conv1d_of_gpt2", "embedding", "conv1d", "conv2d", "conv2d_groups", "conv3d")
"""One layer of each kind."""


def kind_of_layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A base layer."""
    if kind in ("linear", "conv1d_of_gpt2"):
        return base_layer(11, 13, conv1d=kind == "conv1d_of_gpt2", dtype=dtype)
    if kind == "embedding":
        return nn.Embedding(17, 10, dtype=dtype)
    conv: Callable[..., nn.Module] = getattr(nn, kind.split("_")[0].replace("conv", "Conv"))
    return conv(4, 8, **CONVS[kind], dtype=dtype)


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of two samples."""
    if kind == "embedding":
        return torch.tensor([[3, 16, 0], [5, 3, 12]])
    if kind in ("linear", "conv1d_of_gpt2"):
        return torch.randn(2, 13, dtype=dtype)
    sizes: Sequence[int] = {"1": (7,), "2": (3, 4), "3": (2, 3, 2)}[kind[4]]
    return torch.randn(2, 4, *sizes, dtype=dtype)


def applied(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the oracle says that a base layer with the matrix `weight` gives for x, without the bias."""
    if isinstance(base, nn.Embedding):
        return oracle.embedding(x.flatten().tolist(), weight).view(*x.shape, -1)
    if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return oracle.forward(x, weight, None, [])
    kernel = weight.view(base.weight.shape)
    settings = {"stride": base.stride, "dilation": base.dilation, "groups": base.groups, "mode": base.padding_mode}
    return oracle.convolution(x, kernel, padding=padding_of(base), **settings)


def padding_of(base: Any) -> list[tuple[int, int]]:
    if isinstance(base.padding, str):
        totals = [
            d * (k - 1) if base.padding == "same" else 0 for d, k in zip(base.dilation, base.kernel_size, strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in base.padding]


def oracle_of(layer: SmoaLayer, x: Tensor, *adapters: str, **factors: Tensor) -> Tensor:
    """What the oracle says that an adapted layer gives with these adapters active, in float64."""
    base = layer.get_base_layer()
    deltas = [oracle_delta(layer, name, **factors) for name in adapters or ("default",)]
    weight = oracle.effective_weight(base_weight(layer).double(), deltas)
    y = applied(base, x if isinstance(base, nn.Embedding) else x.double(), weight)
    bias = getattr(base, "bias", None)
    if bias is None:
        return y
    shape = (-1, *(1 for _ in getattr(base, "kernel_size", ())))
    return y + bias.detach().double().view(shape)
