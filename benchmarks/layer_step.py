"""Times a training step of one layer with each method.

    python benchmarks/layer_step.py [--shape 4096x4096] [--dtype float32] [--compile]

A step is forward and backward, gradient of x included. Times are taken in turn in one process, and reported as ratios
to the frozen layer's time and to the floor, (2 + 1/K)/2 (float32) or (2 + 3/K)/2 (bfloat16). All methods train as many
parameters as SMoA. Writes benchmarks/results/layer_step_<shape>_<dtype>.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _common import busy_elsewhere, interleaved, pick_device, provenance, write_results
from _layers import OneLayer, adapted, floor, lower_quartile, trainable, training_step

METHODS = ("frozen", "smoa", "lora", "hira", "released")


def compare(base: OneLayer, num_blocks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, ratios and trainable parameters of each method at one K."""
    weight = base.linear.weight
    x = torch.randn(arguments.tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    grad = torch.randn(arguments.tokens, weight.shape[0], dtype=weight.dtype, device=weight.device)
    models = {name: adapted(name, base, arguments.r, num_blocks) for name in arguments.methods}
    parameters = {name: trainable(model) for name, model in models.items()}
    if arguments.compile:
        models = {name: torch.compile(model, fullgraph=name != "released") for name, model in models.items()}
    steps = {name: training_step(model, x, grad) for name, model in models.items()}
    interleaved(steps, arguments.warm_up, weight.device)
    others = busy_elsewhere()
    times = interleaved(steps, arguments.repeats, weight.device)
    frozen = times["frozen"]
    return {
        "num_blocks": num_blocks,
        "floor": floor(weight.dtype, num_blocks),
        "trainable": parameters,
        "seconds": times,
        "ratio": {name: lower_quartile(times[name]) / lower_quartile(frozen) for name in times},
        "ratio_of_fastest": {name: min(times[name]) / min(frozen) for name in times},
        "cores_busy_elsewhere": others(),
    }


def report(result: dict[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in result["ratio"].items() if name != "frozen")
    over = result["ratio"]["smoa"] / result["floor"]
    over_fastest = result["ratio_of_fastest"]["smoa"] / result["floor"]
    frozen = lower_quartile(result["seconds"]["frozen"])
    return (
        f"K={result['num_blocks']}  frozen {frozen:.4f} s  {ratios}  "
        f"smoa ÷ floor {over:.3f} (fastest {over_fastest:.3f})  others {result['cores_busy_elsewhere']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="out_features x in_features")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--compile", action="store_true", help="torch.compile every method")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device, dtype = pick_device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    base = OneLayer(*map(int, arguments.shape.split("x")), dtype, device)
    results = []
    for num_blocks in arguments.num_blocks:
        results.append(compare(base, num_blocks, arguments))
        print(report(results[-1]), flush=True)
    name = f"layer_step_{arguments.shape}_{arguments.dtype}"
    name += "" if arguments.tokens == 1024 else f"_{arguments.tokens}"
    name += "_compiled" if arguments.compile else ""
    content = {"config": vars(arguments), "results": results, "provenance": provenance(device)}
    print(write_results(name, content))


if __name__ == "__main__":
    main()
