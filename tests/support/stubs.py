"""Modules of packages that are not installed, for tests of code that imports them."""

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest


def import_with_stubs(
    monkeypatch: pytest.MonkeyPatch, module: str, stubs: Mapping[str, Mapping[str, Any]]
) -> ModuleType:
    """The module, imported anew where the `stubs` (attributes by module) are all that exists of their packages."""
    for name, attributes in stubs.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            package = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        stub = ModuleType(name)
        vars(stub).update(attributes)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))  # so that it is forgotten after the test
    del sys.modules[module]
    return importlib.import_module(module)
