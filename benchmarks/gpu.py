"""Measures SMoA on a GPU, in parts of at most eight minutes.

    python benchmarks/gpu.py layer        # one layer's training step: time, launches and memory of each method
    python benchmarks/gpu.py model        # a training step of a Llama-3-8B-shaped model with random weights
    python benchmarks/gpu.py quantized    # the same on a 4-bit base
    python benchmarks/gpu.py decoding     # tokens a second: base, merged, in `generate`, LoRA
    python benchmarks/gpu.py injection    # decomposing the weights, and whether the labels are the CPU's

A part that is called again goes on with the rows that are missing. Each writes benchmarks/results/gpu_<part>.json, from
which benchmarks/report.py makes tables. `--tiny` runs everything once with small sizes, on a CPU too, and writes
nothing. Needs `pip install '.[lab]'`, and bitsandbytes for `quantized`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from _common import pick_device
from _gpu import Rows, compiled, cost_of, waiting_refused
from _gpu_model import LLAMA_3_8B, TINY_LLAMA, decode, model_step
from _layers import OneLayer, adapted, training_step
from torch import Tensor
from transformers import LlamaConfig

import smoa
from smoa.maths.blocks import Blocks
from smoa.maths.spectrum import make_partition
from smoa.state import clear_spectrum_cache

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 640))
TOKENS = (512, 4096, 1, 16384)
NUM_BLOCKS = (2, 4, 8)
OTHERS = ("frozen", "lora", "dora", "hira", "released")
OURS = tuple(product(("batched", "loop", "compiled"), ("random", "contiguous")))
MODELS = (("lora", 0, ""), ("hira", 0, ""), *(("smoa", k, p) for k in (8, 2) for p in ("random", "contiguous")))


def layer(rows: Rows, tiny: bool) -> None:
    """One layer in bfloat16, r = 64 at each K, the others with the parameters of K = 8."""
    shapes, all_tokens = (((64, 96),), (3,)) if tiny else (SHAPES, TOKENS)
    methods = [(method, 8, "", "") for method in OTHERS]
    methods += [("smoa", num_blocks, *way) for num_blocks, way in product(NUM_BLOCKS, OURS)]
    for tokens, shape, (method, num_blocks, route, partition) in product(all_tokens, shapes, methods):
        named = {"shape": f"{shape[0]}x{shape[1]}", "tokens": tokens, "method": method, "num_blocks": num_blocks}
        cost = partial(layer_cost, rows, shape, tokens, method, num_blocks, route, partition)
        rows.measure(cost, **named, route=route, partition=partition)


def layer_cost(
    rows: Rows, shape: tuple[int, int], tokens: int, method: str, num_blocks: int, route: str, partition: str
) -> dict[str, Any]:
    base = OneLayer(*shape, torch.bfloat16, rows.device)
    x, grad = (torch.randn(tokens, size, device=rows.device).bfloat16() for size in reversed(shape))
    smoa.use_kernels("loop" if route == "loop" else "batched")
    model = compiled(adapted(method, base, 64, num_blocks, partition or "random"), route == "compiled")
    step = training_step(model, x, grad)
    found = cost_of(step, rows.device, 2 if rows.tiny else 20)
    if route == "batched":
        with waiting_refused(rows.device):
            step()
    return found


def model(rows: Rows, tiny: bool, quantized: bool = False) -> None:
    """Training steps with gradient checkpointing, five targets, the parameters of LoRA r = 8."""
    smoa.use_kernels("batched")
    config, length = (TINY_LLAMA, 16) if tiny else (LLAMA_3_8B, 2048)
    for batch, compile_it, adapter in product((1, 4), (False, True), MODELS):
        named = dict(zip(("method", "num_blocks", "partition"), adapter, strict=True))
        cost = partial(model_cost, rows, config, adapter, batch, length, compile_it, quantized)
        rows.measure(cost, **named, batch=batch, compiled=compile_it)


def model_cost(
    rows: Rows, config: LlamaConfig, adapter: tuple[str, int, str], batch: int, *rest: Any
) -> dict[str, Any]:
    step, tokens = model_step(config, adapter, rows.device, batch, *rest)
    found = cost_of(step, rows.device, 1 if rows.tiny else 5)
    return found | {"tokens_per_second": 1e3 * tokens / found["ms"]}


def decoding(rows: Rows, tiny: bool) -> None:
    """Tokens a second of `generate`, one sequence, after a prompt of 64."""
    smoa.use_kernels("batched")
    config = TINY_LLAMA if tiny else LLAMA_3_8B
    for way in ("base", "merged", "lora", "smoa-8", "smoa-4", "smoa-2"):
        rows.measure(lambda way=way: decode(config, way, rows.device, 4 if tiny else 128), way=way)


def injection(rows: Rows, tiny: bool) -> None:
    """Seconds to decompose weights of each shape, and the share of coordinates with the CPU's label."""
    for shape in ((64, 96),) if tiny else SHAPES:
        weight = torch.nn.init.normal_(torch.empty(shape, device=rows.device), std=0.02)
        rows.measure(partial(injection_cost, rows, weight), shape=f"{shape[0]}x{shape[1]}")


def injection_cost(rows: Rows, weight: Tensor) -> dict[str, Any]:
    def decompose(matrix: Tensor) -> Blocks:
        clear_spectrum_cache()
        return make_partition(matrix, 8)

    found = cost_of(lambda: decompose(weight), rows.device, 1 if rows.tiny else 3)
    own, cpus = decompose(weight), decompose(weight.cpu())
    pairs = (own.row_labels, cpus.row_labels), (own.col_labels, cpus.col_labels)
    same = torch.cat([mine.cpu() == theirs for mine, theirs in pairs]).double().mean().item()
    assert same >= 0.999, f"{same:.5f} of the coordinates have the CPU's label; at least 0.999 must"
    return found | {"same_labels": same}


PARTS: dict[str, Callable[[Rows, bool], None]] = {
    "layer": layer,
    "model": model,
    "quantized": lambda rows, tiny: model(rows, tiny, quantized=True),
    "decoding": decoding,
    "injection": injection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU; --tiny makes a dry run on the CPU")
    torch.manual_seed(0)
    PARTS[arguments.part](Rows(arguments.part, device, arguments.minutes, arguments.tiny), arguments.tiny)


if __name__ == "__main__":
    main()
