"""Unlike adapters of one tiny Llama that a pool serves together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model

from smoa import SmoaConfig
from tests.support import tiny_models

KINDS: dict[str, dict[str, Any]] = {
    "anna": {"r": 4, "num_blocks": 2},
    "ben": {"r": 4, "num_blocks": 2},
    "cleo": {"r": 6, "num_blocks": 4, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "num_blocks": 2, "partition": "contiguous", "scale": "paper", "alpha": 9},
    "emil": {"r": 4, "num_blocks": 2, "modulation": "none"},
}
"""The settings of each, by its name."""


def config(**settings: Any) -> SmoaConfig:
    return SmoaConfig(**{"target_modules": ["q_proj", "v_proj"], "init_weights": False} | settings)


def base() -> Any:
    return tiny_models.build("llama")


def saved(room: Path, kinds: Mapping[str, Mapping[str, Any]] = KINDS, **settings: Any) -> Path:
    """The folder, with an adapter of random factors of each kind in it."""
    for name, own in kinds.items():
        model = get_peft_model(base(), config(**settings | own))
        model.save_pretrained(room / name, save_embedding_layers=False)
    return room
