"""Measures how much of ΔW is lost by merging into quantized weights, by ΔW's relative size.

    python benchmarks/quantized_merge.py

The loss is ‖merged weight − W − ΔW‖ / ‖ΔW‖ over the layers of three decoder blocks of Gemma 3 270M, in 4 and in 8 bits.
Writes benchmarks/results/quantized_merge.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _common import provenance, write_results
from _gemma import QUANTIZATIONS, gemma
from torch import Tensor

from smoa.layers.quantized import QuantizedLinear

BLOCKS = (0, 8, 17)
RELATIVE_SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""rms of ΔW / W on SMoA's blocks."""


@torch.no_grad()
def losses(base: str, arguments: argparse.Namespace) -> dict[str, float]:
    model: Any = gemma("smoa", arguments.r, arguments.num_blocks, torch.device("cpu"), base)
    blocks = [model.base_model.model.model.layers[index] for index in BLOCKS]
    layers = [module for block in blocks for module in block.modules() if isinstance(module, QuantizedLinear)]
    factors = [layer.smoa_B["default"].weight for layer in layers]
    for layer, B in zip(layers, factors, strict=True):
        B.div_(relative_size(layer))
    return {f"{size:g}": loss(layers, factors, size) for size in RELATIVE_SIZES}


def relative_size(layer: QuantizedLinear) -> Tensor:
    delta = layer.delta("default")
    changed = delta != 0
    return (delta[changed] / layer.base_weight()[changed]).square().mean().sqrt()


def loss(layers: list[QuantizedLinear], factors: list[Tensor], size: float) -> float:
    found: list[tuple[float, float]] = []
    for layer, B in zip(layers, factors, strict=True):
        B.mul_(size)
        layer.requantizations = found
        layer.merge()
        layer.unmerge()
        B.div_(size)
    error, update = (sum(value**2 for value in column) ** 0.5 for column in zip(*found, strict=True))
    return error / update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = {base: losses(base, arguments) for base in QUANTIZATIONS}
    result = {
        "config": vars(arguments) | {"blocks": BLOCKS, "quantizations": QUANTIZATIONS},
        "relative_error": found,
        "provenance": provenance(torch.device("cpu")),
    }
    print(found, write_results("quantized_merge", result))


if __name__ == "__main__":
    main()
