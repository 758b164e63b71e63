"""Keeps import paths of 0.1 working, such as `smoa.conversion`. Most of them warn."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapter_card": "files.adapter_card",
    "adapter_folder": "files.adapter_folder",
    "analysis": "maths.analysis",
    "autograd": "maths.kernels.operators",
    "base_checkpoint": "export.base_checkpoint",
    "budget": "maths.budget",
    "checkpoint": "files.checkpoint",
    "combining": "tuner.combining",
    "conversion": "export.lora",
    "distributed": "layers.distributed",
    "hotswap": "tuner.hotswap",
    "layer": "layers.layer",
    "linear": "layers.kinds.linear",
    "merging": "layers.undo",
    "mixed_batch": "tuner.mixed_batch",
    "model": "tuner.model",
    "model_card": "export.model_card",
    "modulation": "maths.factors",
    "quantized": "layers.kinds.quantized",
    "saving": "files.saving",
    "shards": "export.shards",
    "spectrum": "maths.spectrum",
    "spectrum_cache": "maths.spectrum_cache",
    "streaming": "export.streaming",
    "targets": "tuner.targets",
    "weight_cache": "layers.weight_cache",
}
DOCUMENTED = {"analysis", "budget", "conversion", "hotswap"}
"""Names that docs/api.md keeps; they do not warn."""


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == "smoa" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Enter the moved module under its old name."""
        name = module.__name__.partition(".")[2]
        if name not in DOCUMENTED:
            warnings.warn(
                f"smoa.{name} has moved to smoa.{MOVED[name]}; the old path will be removed in smoa 0.4",
                DeprecationWarning,
                stacklevel=2,
            )
        sys.modules[module.__name__] = importlib.import_module(f"smoa.{MOVED[name]}")


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
