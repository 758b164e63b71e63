"""Compares a training step of adapted experts, with SMoA and with LoRA, on top of that of the frozen experts.

    python benchmarks/experts.py

The experts are those of Qwen3-MoE: a stack of gate and up, and one of down. LoRA adapts them by PEFT's `ParamWrapper`.
Each method is timed with each of transformers' experts functions, all in turn. Memory is the most that torch's
allocator holds at once during a step, in addition to what it held before.
Writes benchmarks/results/experts.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import interleaved, pick_device, provenance, write_results
from _layers import trainable
from peft import LoraConfig, inject_adapter_in_model
from quantized_memory import step_peak
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from smoa import SmoaConfig

METHODS = ("frozen", "lora", "smoa")
FUNCTIONS = ("eager", "grouped_mm")
TARGETS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


class Mixture(nn.Module):
    """The experts of one layer."""

    def __init__(self, function: str, intermediate: int, arguments: argparse.Namespace) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=arguments.hidden, moe_intermediate_size=intermediate, num_experts=arguments.experts
        )
        config._experts_implementation = function
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_(False)


def adapted(method: str, model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    configs = {
        "lora": LoraConfig(r=arguments.lora_r, **TARGETS),
        "smoa": SmoaConfig(r=arguments.r, num_blocks=arguments.num_blocks, **TARGETS),
    }
    return inject_adapter_in_model(configs[method], model) if method in configs else model


def training_step(model: nn.Module, arguments: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Forward and backward of random tokens, each with its own experts."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.rand(arguments.tokens, arguments.experts, generator=generator).topk(arguments.top).indices.to(device)
    weights = torch.rand(arguments.tokens, arguments.top, generator=generator).to(device)
    x = torch.randn(arguments.tokens, arguments.hidden, generator=generator).to(device).requires_grad_()

    def step() -> None:
        x.grad = None
        model.zero_grad()
        model.experts(x, picked, weights).sum().backward()

    return step


def measure(intermediate: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times and memory of each method and function."""
    steps, counts = {}, {}
    for method in METHODS:
        for function in FUNCTIONS:
            model = adapted(method, Mixture(function, intermediate, arguments).to(device), arguments)
            steps[f"{method} {function}"] = training_step(model, arguments, device)
            counts[method] = trainable(model)
    for step in steps.values():
        step()
    memory = {name: step_peak(step) for name, step in steps.items()} if device.type == "cpu" else {}
    times = interleaved(steps, arguments.repeats, device)
    return {"intermediate": intermediate, "trainable": counts, "times": times, "memory": memory}


def on_top(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Time and memory of each method's fastest function, in addition to those of the frozen experts' fastest."""
    median = {name: statistics.median(times) for name, times in found["times"].items()}
    fastest = {method: min((n for n in median if n.startswith(method)), key=median.__getitem__) for method in METHODS}
    return {
        method: {
            "seconds": median[fastest[method]] - median[fastest["frozen"]],
            "bytes": found["memory"][fastest[method]] - found["memory"][fastest["frozen"]],
        }
        for method in METHODS[1:]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = pick_device(arguments.device)
    cases = [measure(intermediate, arguments, device) for intermediate in arguments.intermediate]
    for case in cases:
        case["on_top"] = on_top(case)
        case["ratio"] = {
            unit: case["on_top"]["smoa"][unit] / case["on_top"]["lora"][unit] for unit in ("seconds", "bytes")
        }
        print(case["intermediate"], case["on_top"], case["ratio"])
    result = {"config": vars(arguments), "seed": 0, "cases": cases, "provenance": provenance(device)}
    print(write_results("experts", result))


if __name__ == "__main__":
    main()
