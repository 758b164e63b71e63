"""Times calls of one small layer, where Python takes the time and not the products.

    python benchmarks/calls.py calls [--size 64]

SMoA with r = 8, K = 4 beside PEFT's LoRA r = 2, which trains as much. A call of 1 token takes no gradients; a step is
forward and backward, of 1 token and of 512. Processor time of one thread, the median of 12 turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import run
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from smoa import SmoaConfig

TURNS = 12
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["layer"]),
    "spectral": SmoaConfig(r=8, num_blocks=4, target_modules=["layer"]),
    "contiguous": SmoaConfig(r=8, num_blocks=4, partition="contiguous", target_modules=["layer"]),
}


def calls(device: torch.device, size: int = 64) -> dict[str, Any]:
    """A layer of `size` × `size` in float32: a call without gradients, and steps."""
    torch.set_num_threads(1)
    layers = {name: layer_of(config, size, device) for name, config in METHODS.items()}
    kinds: dict[str, tuple[Callable[[nn.Module, Tensor], object], int, int]] = {
        "call of 1 token": (call, 1, 300),
        "step of 1 token": (step, 1, 150),
        "step of 512 tokens": (step, 512, 50),
    }
    rows = []
    for kind, (function, tokens, repeats) in kinds.items():
        x = torch.randn(tokens, size, device=device)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for _turn in range(TURNS + 1):
            for name, layer in layers.items():
                start = time.process_time()
                for _ in range(repeats):
                    function(layer, x)
                seconds[name].append((time.process_time() - start) / repeats)
        medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
        rows.append({"kind": kind, **{f"{name}_us": 1e6 * value for name, value in medians.items()}})
        for name, value in medians.items():
            print(f"{kind:20s} {name:12s} {1e6 * value:7.0f} us {value / medians['lora']:5.2f} of LoRA's")
    return {"name": f"calls_{size}", "size": size, "rows": rows}


def layer_of(config: PeftConfig, size: int, device: torch.device) -> nn.Module:
    """A linear layer with an adapter whose factors are drawn."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(size, size, bias=False, device=device)})
    adapted: nn.Module = inject_adapter_in_model(config, base)["layer"]
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return adapted


@torch.no_grad()
def call(layer: nn.Module, x: Tensor) -> object:
    """A call without gradients."""
    return layer(x)


def step(layer: nn.Module, x: Tensor) -> object:
    """Forward and backward."""
    return layer(x).sum().backward()


if __name__ == "__main__":
    run(__doc__, calls=calls)
