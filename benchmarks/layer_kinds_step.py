"""Times a training step of an adapted convolution and embedding, with SMoA, LoRA and HiRA at equal parameters.

    python benchmarks/layer_kinds_step.py

Forward and backward in float32, with the gradient of x for convolutions, all methods in turn. The frozen embedding has
no backward. Writes benchmarks/results/layer_kinds_step.json: lower quartiles, and their ratios to the frozen layer's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from _common import busy_elsewhere, interleaved, pick_device, provenance, write_results
from _layers import lower_quartile
from peft import HiraConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from smoa import SmoaConfig

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv 256 → 256, 3×3, on 4 × 28 × 28": (
        lambda: nn.Conv2d(256, 256, 3, padding=1),
        lambda: torch.randn(4, 256, 28, 28),
    ),
    "patches 3 → 768, 16×16, of 8 × 224 × 224": (
        lambda: nn.Conv2d(3, 768, 16, 16),
        lambda: torch.randn(8, 3, 224, 224),
    ),
    "embedding 50,000 × 1024, of 4 × 512 tokens": (
        lambda: nn.Embedding(50_000, 1024),
        lambda: torch.randint(0, 50_000, (4, 512)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=32, help="SMoA's; LoRA and HiRA get r / K")
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    others = busy_elsewhere()
    measured = {name: compare(*row, arguments, device) for name, row in LAYERS.items()}
    content = {"config": vars(arguments), "layers": measured, "cores_busy_elsewhere": others()}
    print(write_results("layer_kinds_step", {**content, "provenance": provenance(device)}))


def compare(
    build: Callable[[], nn.Module], draw: Callable[[], Tensor], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds of each method's step, and ratios to the frozen layer's."""
    base, x = build().to(device).requires_grad_(False), draw().to(device)
    x = x.requires_grad_() if x.is_floating_point() else x
    rank = arguments.r // arguments.num_blocks
    chosen: dict[str, Any] = {"target_modules": ["layer"]}
    blocks = {"num_blocks": arguments.num_blocks, "partition": "random"}  # costs what spectral blocks cost
    configs = {
        "SMoA": SmoaConfig(r=arguments.r, **blocks, **chosen),
        "LoRA": LoraConfig(r=rank, **chosen),
        "HiRA": HiraConfig(r=rank, **chosen),
    }
    steps = {"frozen": step(base, x)} | {name: step(adapted(base, config), x) for name, config in configs.items()}
    interleaved(steps, 1, device)
    seconds = {name: lower_quartile(times) for name, times in interleaved(steps, arguments.repeats, device).items()}
    return {"seconds": seconds, "ratios": {name: round(one / seconds["frozen"], 2) for name, one in seconds.items()}}


def adapted(base: nn.Module, config: Any) -> nn.Module:
    return inject_adapter_in_model(config, nn.ModuleDict({"layer": copy.deepcopy(base)}))["layer"].train()


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        y = layer(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))

    return run


if __name__ == "__main__":
    main()
