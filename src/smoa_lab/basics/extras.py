"""Which extra of smoa installs a package that is missing, by smoa's own metadata; it works without any of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib.metadata import metadata, requires
from typing import Any

from packaging.requirements import Requirement

Needs = Mapping[str, tuple[str, ...]]
"""Modules, by what needs them, such as a place in a config; but for those that PEFT brings."""
DRAWING = ("altair", "vl_convert", "PIL")
"""The modules that draw charts."""
PACKAGES = {"PIL": "pillow", "pyarrow": "datasets", "ruamel": "ruamel-yaml", "vl_convert": "vl-convert-python"}
"""Of modules that are named differently, but for - and _, or that another package brings."""


@cache
def extras() -> dict[str, set[str]]:
    """The packages of each extra, those of the extras that it includes among them; the smaller extras first."""
    names = metadata("smoa").get_all("Provides-Extra") or []
    lines = [Requirement(line) for line in requires("smoa") or []]
    optional = [line for line in lines if line.marker and not line.marker.evaluate({"extra": ""})]
    within = {name: {line.name for line in optional if line.marker.evaluate({"extra": name})} for name in names}  # type: ignore[union-attr]
    return dict(sorted(within.items(), key=lambda item: len(item[1])))


def package_of(module: str | None) -> str | None:
    """The package that brings a module, or None if no extra has it."""
    root = (module or "").partition(".")[0]
    package = PACKAGES.get(root, root.replace("_", "-"))
    return package if any(package in packages for packages in extras().values()) else None


def advice(module: str | None) -> str | None:
    """How to install the package of a module, or None if no extra has it."""
    package = package_of(module)
    return package and f"needs {package}; {install(*_extras_with(package))}"


def install(*names: str) -> str:
    """How to install smoa with these extras; its name is not on the package index yet."""
    return f"in a clone of smoa, run: pip install '.[{','.join(names)}]'"


def _extras_with(*packages: str) -> list[str]:
    """The smallest extra of each package, without those that another one of them includes."""
    names = {next(name for name, within in extras().items() if package in within) for package in packages}
    return sorted(name for name in names if not any(extras()[name] < extras()[other] for other in names))


def missing(*modules: str) -> str | None:
    """The advice for the first of the modules that is not installed, or None."""
    return next((advice(module) for module in modules if not _installed(module)), None)


def require(needs: Needs) -> None:
    """Check that everything is installed that will be needed.

    Raises:
        DataError: something is not; the message lists all that is missing, and names the extras.
    """
    lacking = {
        purpose: [package for module in modules if not _installed(module) and (package := package_of(module))]
        for purpose, modules in needs.items()
    }
    if not any(lacking.values()):
        return
    from smoa.errors import DataError  # here, since importing smoa imports torch

    lists = [f"{purpose}: needs {', '.join(packages)}" for purpose, packages in lacking.items() if packages]
    wanted = _extras_with(*(package for packages in lacking.values() for package in packages))
    raise DataError(f"{'; '.join(lists)}; {install(*wanted)}")


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
