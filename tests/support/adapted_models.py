"""Models with adapters of random factors."""

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from smoa import SmoaConfig
from tests.support.layers import randomise, smoa_layers

QV = ["q_proj", "v_proj"]
SETTINGS: dict[str, Any] = {"r": 4, "num_blocks": 2, "target_modules": QV}


def adapted(base: nn.Module, adapter: str = "default", **config: Any) -> PeftModel:
    """`base` in evaluation with an adapter, by default on query and value projections."""
    model = get_peft_model(base, SmoaConfig(**SETTINGS | config), adapter)
    _randomise(model, adapter)
    return model.eval()


def add_adapter(model: PeftModel, adapter: str, **config: Any) -> None:
    """Another adapter on the same model, not active yet."""
    model.add_adapter(adapter, SmoaConfig(**SETTINGS | config))
    _randomise(model, adapter)


def _randomise(model: PeftModel, adapter: str) -> None:
    for layer in smoa_layers(model).values():
        if adapter in layer.smoa_A:
            randomise(layer, adapter)
