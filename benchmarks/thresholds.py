"""Measures the threshold of the fused route that cannot be derived.

    python benchmarks/thresholds.py

`MASK_COST` (smoa/maths/kernels/fused.py) is the rank from which stacking the blocks and masking is faster than
scattered factors. The thresholds of smoa/maths/kernels/choice.py are held against loops by layer_kernels.py. Writes
benchmarks/results/thresholds_mask_cost.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _common import interleaved, pick_device, provenance, write_results
from _layers import OneLayer, adapted, lower_quartile, training_step

import smoa.maths.kernels.fused

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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    rows = mask_cost(device, arguments.repeats)
    content = {"config": vars(arguments), "results": rows, "provenance": provenance(device)}
    print(write_results("thresholds_mask_cost", content))


if __name__ == "__main__":
    main()
