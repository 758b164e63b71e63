"""Measures how a training step of one SMoA layer grows with tokens, width, K and r.

    python benchmarks/sweep.py [--dtype float32]

Reports time ÷ floor and the bytes kept for the backward. One quantity changes at a time; the others stay at 1,024
tokens, width 2,048, K = 4, r = 32. Writes benchmarks/results/sweep_<dtype>.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _common import interleaved, pick_device, provenance, write_results
from _layers import OneLayer, adapted, floor, lower_quartile, training_step
from torch import Tensor, nn

START = {"tokens": 1024, "width": 2048, "num_blocks": 4, "r": 32}
VALUES = {
    "tokens": (1, 16, 64, 256, 1024, 4096, 16384),
    "width": (512, 1024, 2048, 4096, 8192),
    "num_blocks": (1, 2, 4, 8, 16, 32, 64),
    "r": (8, 16, 32, 64, 128, 256),
}
SECONDS_A_POINT = 4.0


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, except frozen weights, which exist anyway."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x.detach().requires_grad_(True))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def measure(point: dict[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    base = OneLayer(point["width"], point["width"], dtype, device)
    x, grad = (torch.randn(point["tokens"], point["width"], dtype=dtype, device=device) for _ in range(2))
    models = {name: adapted(name, base, point["r"], point["num_blocks"]) for name in ("frozen", "smoa")}
    steps = {name: training_step(model, x, grad) for name, model in models.items()}
    once = sum(times[0] for times in interleaved(steps, 1, device).values())
    repeats = max(3, min(15, int(SECONDS_A_POINT / once)))
    times = interleaved(steps, repeats, device)
    ratio = lower_quartile(times["smoa"]) / lower_quartile(times["frozen"])
    least = floor(dtype, point["num_blocks"])
    return point | {
        "seconds": times,
        "ratio": ratio,
        "floor": least,
        "over_floor": ratio / least,
        "kept_bytes": kept_bytes(models["smoa"], x),
        "input_bytes": x.nbytes,
        "weight_bytes": base.linear.weight.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, values in VALUES.items():
        results[name] = []
        for value in values:
            result = measure(START | {name: value}, getattr(torch, arguments.dtype), device)
            results[name].append(result)
            print(f"{name}={value}  ÷ floor {result['over_floor']:.3f}  kept {result['kept_bytes']:,} B", flush=True)
    content = {"config": vars(arguments), "results": results, "provenance": provenance(device)}
    print(write_results(f"sweep_{arguments.dtype}", content))


if __name__ == "__main__":
    main()
