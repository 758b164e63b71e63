"""Reads a SMoA adapter for vLLM: the factors of linear layers, checked before anything of the engine changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peft.utils import CONFIG_NAME

from smoa.config import Shape, SmoaConfig
from smoa.errors import ConfigError, first_of
from smoa.files.loading import saved_config
from smoa.serving.saved import SavedLayer, Template, read_by_template

REMEDY = "vLLM serves factors of linear layers only; merge it with `smoa merge` and serve the model"


def is_smoa(folder: str | Path) -> bool:
    """Whether the folder's config is a SMoA adapter's; of a folder without a readable one vLLM says what is wrong."""
    return saved_config(Path(folder, CONFIG_NAME)).get("peft_type") == "SMOA"


def read_layers(folder: str, shape_of: Callable[[str], Shape | str], known: list[Template]) -> dict[str, SavedLayer]:
    """The checked factors of each layer, by its name in the adapter.

    Args:
        folder: The adapter's.
        shape_of: Gives (out_features, in_features) of the layer of a name, or why it can't be adapted.
        known: What was read before.
    """
    config = SmoaConfig.from_pretrained(folder)
    settings = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
    settings |= {"target_parameters": config.target_parameters, "bias": config.bias if config.bias != "none" else None}
    refused = [f"{name}={value!r}" for name, value in settings.items() if value]
    if refused:
        raise ConfigError(f"{folder}: has {', '.join(refused)}; {REMEDY}")

    def shapes_of(paths: Sequence[str]) -> dict[str, Shape]:
        shapes = {path: shape_of(path) for path in paths}
        refused = [f"{path} ({shape})" for path, shape in shapes.items() if isinstance(shape, str)]
        if refused:
            raise ConfigError(f"{folder}: adapts {first_of(refused)}; {REMEDY}")
        return {path: shape for path, shape in shapes.items() if not isinstance(shape, str)}

    return read_by_template(known, folder, config, REMEDY, shapes_of)
