"""Import paths of 0.1 still work; those that no document names warn."""

from __future__ import annotations

import importlib
import sys

import pytest

from smoa._aliases import DOCUMENTED, MOVED


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_path_leads_to_the_moved_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"smoa.{name}", raising=False)
    new = importlib.import_module(f"smoa.{MOVED[name]}")
    if name in DOCUMENTED:
        assert importlib.import_module(f"smoa.{name}") is new
    else:
        with pytest.warns(DeprecationWarning, match=f"smoa.{name} has moved to smoa.{MOVED[name]}"):
            assert importlib.import_module(f"smoa.{name}") is new


def test_a_moved_module_keeps_its_own_name() -> None:
    import smoa.budget

    assert smoa.budget.__name__ == smoa.budget.__spec__.name == "smoa.maths.budget"


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("smoa.nothing")
