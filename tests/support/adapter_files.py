"""Saved adapters, changed on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder after its tensors were changed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


def with_settings(folder: Path, **settings: Any) -> Path:
    """The folder after its config was edited."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder
