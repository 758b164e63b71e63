"""Reads the layers of vLLM: their sizes, what a rank of tensor parallelism has of them, and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoa.errors import ConfigError

IDENTITY_ROWS = 512
"""So many unit vectors at once give rows of a packed or quantized weight."""
NONLINEAR = 0.01
"""By so much may products with vectors of three sizes differ, which rounding makes."""


def totals_of(layer: Any) -> tuple[list[int], int]:
    """out_features of each slice of a LoRA layer's base and its in_features, of all ranks of tensor parallelism."""
    base = layer.base_layer
    if hasattr(base, "total_num_kv_heads"):  # q, k and v, whose `output_sizes` count each copy of a head
        heads = base.total_num_heads, base.total_num_kv_heads, base.total_num_kv_heads
        return [count * base.head_size for count in heads], base.input_size
    return list(getattr(base, "output_sizes", [base.output_size])), base.input_size


def places_of_rank(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """The outputs and inputs of each slice that this rank of tensor parallelism has: what vLLM cuts of a LoRA."""
    sizes, size = totals_of(layer)
    rows, cols = [torch.arange(own)[:, None] for own in sizes], torch.arange(size)[None]
    if layer.n_slices == 1:
        own = torch.arange(sum(sizes))[:, None]
        return [(layer.slice_lora_b(own).flatten(), layer.slice_lora_a(cols).flatten())]
    cut = zip(layer.slice_lora_b(rows), layer.slice_lora_a([cols] * len(rows)), strict=True)
    return [(own.flatten(), inputs.flatten()) for own, inputs in cut]


def weight_of(layer: Any, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """This rank's W (out_features, in_features) of a LoRA layer's base, and whether it is stored so.

    vLLM packs it on CPUs, and quantizes it: then products with unit vectors give it, of the size that the layer's own
    quantization of inputs takes exactly, if its scale is fixed.

    Raises:
        ConfigError: the products don't grow with the vectors, as where these are cut at a calibrated maximum.
    """
    base, shape = layer.base_layer, (sum(layer.output_slices), layer.input_size)
    stored = getattr(base, "weight", None)
    if type(base.quant_method).__name__ == "UnquantizedLinearMethod" and stored is not None and stored.shape == shape:
        return stored.detach(), True
    fixed = getattr(base, "input_scale", None)
    unit = float(fixed.max()) if isinstance(fixed, Tensor) and fixed.numel() else 1.0

    def read(vectors: Tensor, size: float) -> Tensor:
        return base.quant_method.apply(base, vectors * size, None).T.float() / size  # type: ignore[no-any-return]

    some = torch.eye(min(IDENTITY_ROWS, shape[1]), shape[1], dtype=dtype, device=layer.device)
    once, *others = (read(some, unit * times) for times in (1.0, 3.0, 1 / 3))
    if all((once - other).norm() > NONLINEAR * once.norm() for other in others):
        raise ConfigError(
            f"{layer.smoa_name.removesuffix('.smoa')}: its weight can't be read, because its inputs are quantized by a "
            "scale that was fixed by calibration; serve a checkpoint with dynamic activation scales, or a merged model"
        )
    W = torch.empty(shape, dtype=dtype, device=layer.device)
    for first in range(0, shape[1], IDENTITY_ROWS):
        vectors = torch.zeros(min(IDENTITY_ROWS, shape[1] - first), shape[1], dtype=dtype, device=layer.device)
        vectors[:, first : first + IDENTITY_ROWS].fill_diagonal_(1)
        W[:, first : first + IDENTITY_ROWS] = read(vectors, unit)
    return W, False
