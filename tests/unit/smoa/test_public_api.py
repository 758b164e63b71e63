"""What `import smoa` (smoa/__init__.py) promises: names, version, types, and that it stays light."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest
import yaml

import smoa

SOURCE = Path(smoa.__file__).parent


def test_all_is_what_is_exported() -> None:
    assert smoa.__all__ == sorted(set(smoa.__all__))
    submodules = {path.stem for path in SOURCE.iterdir()}
    exported = {name for name in vars(smoa) if not name.startswith("_")} - submodules
    plumbing = {
        "annotations",
        "check_peft_version",
        "ensure_peft_type",
        "guard_loading",
        "install_state_dict_hooks",
        "register",
    }
    assert exported - plumbing == set(smoa.__all__)


@pytest.mark.parametrize("path", ["analysis", "budget", "conversion", "hotswap"])
def test_a_public_path_gives_what_its_module_has(path: str) -> None:
    module = importlib.import_module(f"smoa.{path}")
    assert all((getattr(module, name).__doc__ or "").strip() for name in module.__all__)


def test_every_public_name_is_documented() -> None:
    assert [name for name in smoa.__all__ if not (getattr(smoa, name).__doc__ or "").strip()] == []


def test_the_version_is_that_of_the_package() -> None:
    assert smoa.__version__ == importlib.metadata.version("smoa")
    citation = yaml.safe_load((SOURCE.parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == smoa.__version__
    assert (SOURCE / "py.typed").is_file()
