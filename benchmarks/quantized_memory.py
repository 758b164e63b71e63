"""Compares the memory of a training step on a quantized model, with SMoA and with LoRA.

    python benchmarks/quantized_memory.py --base nf4

The model is Gemma 3 270M, and both methods train as many parameters. Each runs in a process of its own. Reported are
the most that torch allocates at once, weights included; peak resident memory, which on a CPU also counts the mapped
file; the bytes saved for the backward of a step; and seconds per step. `--base float32` is for comparison.
Writes benchmarks/results/quantized_memory_<base>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from _common import pick_device, provenance, seconds, write_results
from _gemma import QUANTIZATIONS, gemma
from _layers import trainable
from model_step import example_batch, training_step
from torch import Tensor, nn

METHODS = ("smoa", "lora")


def measure(method: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of one method, in this process."""
    model = gemma(method, arguments.r, arguments.num_blocks, device, arguments.base)
    step = training_step(model, example_batch(arguments, device))
    saved = saved_bytes(model, step)
    allocated = weight_bytes(model) + step_peak(step) if device.type == "cpu" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
    times = [seconds(step, device) for _ in range(arguments.steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()
    found = {"allocated_bytes": allocated or peak, "resident_bytes": peak, "saved_bytes": saved, "seconds": times}
    return found | {"weight_bytes": weight_bytes(model), "trainable": trainable(model)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and the other tensors of quantized layers; tied ones count once."""
    tensors = model.state_dict(keep_vars=True).values()
    return sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}.values())


def step_peak(step: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator holds at once during a step, in addition to those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    held = (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]")
    return max(accumulate(held))


def saved_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes of tensors other than parameters that autograd keeps during one step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def _peak_resident() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measured_apart(method: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", method]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("float32", *QUANTIZATIONS), default="nf4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer", type=int, default=16, help="tokens of the answer, at the end")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments, device)))
        return
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(arguments.repeats):
        for method in METHODS:
            runs[method].append(measured_apart(method))
    peaks = {method: statistics.median(run["allocated_bytes"] for run in found) for method, found in runs.items()}
    result = {
        "config": vars(arguments),
        "runs": runs,
        "allocated_bytes": peaks,
        "ratio": peaks["smoa"] / peaks["lora"],
        "provenance": provenance(device),
    }
    for method, found in runs.items():
        saved, fastest = found[0]["saved_bytes"] / 2**20, min(min(run["seconds"]) for run in found)
        print(f"{method} peak {peaks[method] / 2**20:.0f} MiB, saved {saved:.0f} MiB, {fastest:.2f} s a step")
    print(result["ratio"], write_results(f"quantized_memory_{arguments.base}", result))


if __name__ == "__main__":
    main()
