"""Measures the two thresholds of the library that cannot be derived.

    python benchmarks/thresholds.py [--only fused_min_tokens|mask_cost]

`FUSED_MIN_TOKENS` (smoa/layers/linear.py) is the number of tokens from which a forward without gradients is faster with
W + ΔW. `MASK_COST` (smoa/maths/kernels/fused.py) is the rank from which stacking the blocks and masking is faster than
scattered factors. Writes benchmarks/results/thresholds_<name>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _common import interleaved, pick_device, provenance, write_results
from _layers import OneLayer, adapted, lower_quartile, training_step

import smoa.maths.kernels.fused
from smoa.layers.linear import Linear

SHAPES = ((2048, 640), (4096, 4096))
NUM_BLOCKS = (2, 8)


def with_setting(owner: Any, name: str, value: Any, function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        function()
        setattr(owner, name, before)

    return run


def either_way(
    owner: Any, name: str, values: Mapping[str, Any], function: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Seconds of `function` with each value of the attribute `name` of `owner`."""
    ways = {way: with_setting(owner, name, value, function) for way, value in values.items()}
    interleaved(ways, 1)
    return {way: lower_quartile(times) for way, times in interleaved(ways, repeats).items()}


def fused_min_tokens(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a forward without gradients, fused and apart, for each number of tokens."""
    rows = []
    for shape in SHAPES:
        for num_blocks in NUM_BLOCKS:
            model = adapted("smoa", OneLayer(*shape, torch.float32, device), 32, num_blocks).eval()
            layer = next(module for module in model.modules() if isinstance(module, Linear))
            routes = {"fused": "fused", "apart": "apart"}
            for tokens in (1, 8, 32, 64, 128, 256, 512):
                x = torch.randn(tokens, shape[1], device=device)
                times = either_way(layer, "route", routes, torch.no_grad()(lambda model=model, x=x: model(x)), repeats)
                row = {"shape": shape, "num_blocks": num_blocks, "tokens": tokens}
                rows.append(row | times)
                print(rows[-1], flush=True)
    return rows


def mask_cost(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a training step, stacked and scattered, for each r."""
    rows = []
    costs = {"stacked": -1, "scattered": 1 << 30}
    for shape in SHAPES:
        for num_blocks in NUM_BLOCKS:
            for r in (16, 32, 64, 128, 256):
                model = adapted("smoa", OneLayer(*shape, torch.float32, device), r, num_blocks)
                x, grad = torch.randn(128, shape[1], device=device), torch.randn(128, shape[0], device=device)
                times = either_way(smoa.maths.kernels.fused, "MASK_COST", costs, training_step(model, x, grad), repeats)
                row = {"shape": shape, "num_blocks": num_blocks, "r": r, "saved_rank": r - -(-r // num_blocks)}
                rows.append(row | times)
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"fused_min_tokens": fused_min_tokens, "mask_cost": mask_cost}
    parser.add_argument("--only", choices=studies)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    for name in [arguments.only] if arguments.only else studies:
        rows = studies[name](device, arguments.repeats)
        content = {"config": vars(arguments), "results": rows, "provenance": provenance(device)}
        print(write_results(f"thresholds_{name}", content))


if __name__ == "__main__":
    main()
