"""Times an adapted layer as the library computes it now, against as it did with loops over the blocks alone.

    python benchmarks/layer_kernels.py [--only 640x640]

"before" is the loop kernels with the rule that they had: W + ΔW for float32, except for forwards without gradients of
fewer than 64 tokens on 8 blocks or more. "now" is what `SMOA_KERNELS=auto` takes. A step is forward and backward, with
the gradient of x. Times are taken in turn in one process. Writes benchmarks/results/layer_kernels.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from _common import busy_elsewhere, interleaved, pick_device, provenance, write_results
from _layers import OneLayer, adapted, lower_quartile, training_step
from torch import nn

import smoa
from smoa.layers.linear import Linear

SHAPES = ("256x256", "640x640", "2048x640", "4096x4096")
DTYPES = ("float32", "bfloat16")
PARTITIONS = ("random", "contiguous")
NUM_BLOCKS = (2, 8)
TOKENS = (1, 16, 64, 512)


def as_before(layer: Linear, tokens: int, training: bool, function: Callable[[], object]) -> Callable[[], None]:
    """`function` with loops and the rule of old."""
    num_blocks = len(layer.ranks["default"])
    apart = not training and num_blocks >= 8 and tokens < 64

    def run() -> None:
        smoa.use_kernels("loop")
        layer.route = "apart" if apart else "fused"
        function()
        layer.route = "auto"
        smoa.use_kernels("auto")

    return run


def times_of(model: nn.Module, x: torch.Tensor, grad: torch.Tensor, training: bool, repeats: int) -> dict[str, float]:
    """Seconds, before and now."""
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    now = training_step(model, x, grad) if training else torch.no_grad()(lambda: model(x))
    ways = {"before": as_before(layer, len(x), training, now), "now": now}
    interleaved(ways, 2)
    return {way: lower_quartile(times) for way, times in interleaved(ways, repeats).items()}


def measure(shape: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row for each dtype, partition, K, number of tokens, and step or forward."""
    rows = []
    out_features, in_features = map(int, shape.split("x"))
    for dtype, partition, num_blocks in product(DTYPES, PARTITIONS, NUM_BLOCKS):
        base = OneLayer(out_features, in_features, getattr(torch, dtype), device)
        model = adapted("smoa", base, 16, num_blocks, partition)
        for tokens, training in product(TOKENS, (True, False)):
            x, grad = (torch.randn(tokens, size).to(base.linear.weight) for size in (in_features, out_features))
            row = {"shape": shape, "dtype": dtype, "partition": partition, "num_blocks": num_blocks, "tokens": tokens}
            row |= {"part": "step" if training else "forward"} | times_of(model, x, grad, training, repeats)
            rows.append(row | {"ratio": row["now"] / row["before"]})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device, others = pick_device(arguments.device), busy_elsewhere()
    torch.manual_seed(0)
    shapes = [arguments.only] if arguments.only else SHAPES
    rows = [row for shape in shapes for row in measure(shape, device, arguments.repeats)]
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
    print(f"geometric mean {mean:.3f}, highest {max(row['ratio'] for row in rows):.3f}")
    content = {"config": vars(arguments), "results": rows, "geometric_mean": mean, "cores_busy_elsewhere": others()}
    print(write_results("layer_kernels", content | {"provenance": provenance(device)}))


if __name__ == "__main__":
    main()
