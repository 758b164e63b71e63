"""One frozen layer, adapted by each method, and the training step that is timed."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from released import ReleasedLinear
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.maths.spectrum import make_partition


class OneLayer(nn.Module):
    """A frozen linear layer without bias, with weights as large as in trained layers (rms 0.02)."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
        nn.init.normal_(self.linear.weight, std=0.02).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(method: str, base: OneLayer, r: int, num_blocks: int, partition: str = "random") -> nn.Module:
    """`base` with a method. All except "frozen" train as many parameters as SMoA of rank r with K blocks.

    The partition is random or contiguous, because decomposing the weight would not change the cost of a step.
    """
    layer = OneLayer(*base.linear.weight.shape, base.linear.weight.dtype, base.linear.weight.device)
    layer.linear.weight = base.linear.weight
    if method == "frozen":
        return layer
    if method == "released":
        return ReleasedLinear(layer.linear, r, make_partition(layer.linear.weight, num_blocks, partition))
    configs: dict[str, Callable[[], PeftConfig]] = {
        "smoa": lambda: SmoaConfig(
            r=r, num_blocks=num_blocks, target_modules=["linear"], partition=partition, init_weights=False
        ),
        "hira": lambda: HiraConfig(r=max(1, r // num_blocks), target_modules=["linear"], init_weights=False),
        "lora": lambda: LoraConfig(r=max(1, r // num_blocks), target_modules=["linear"], init_lora_weights=False),
        "dora": lambda: LoraConfig(r=max(1, r // num_blocks), target_modules=["linear"], use_dora=True),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(layer, configs[method]())


def training_step(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """A step of forward and backward that computes the gradient of the input too."""
    parameters = list(model.parameters())

    def step() -> None:
        leaf = x.detach().requires_grad_(True)
        model(leaf).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    return step


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def floor(dtype: torch.dtype, num_blocks: int) -> float:
    """Lower bound of a step's cost, in steps of the frozen layer: matrix products only, no passes over the weight."""
    products = 1 if dtype in (torch.float32, torch.float64) else 3
    return (2 + products / num_blocks) / 2


def lower_quartile(times: list[float]) -> float:
    """The lower quartile, because other processes only add time."""
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]
