"""What `import smoa` (smoa/__init__.py) promises: names, version, types, and that it stays light."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest
import yaml

import smoa

SOURCE = Path(smoa.__file__).parent


def test_all_is_sorted_and_holds_each_name_once() -> None:
    assert smoa.__all__ == sorted(set(smoa.__all__))


def test_all_is_what_is_exported() -> None:
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


@pytest.mark.parametrize("name", smoa.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(smoa, name).__doc__ or "").strip()


def test_every_error_is_a_smoa_error() -> None:
    errors = [getattr(smoa, name) for name in smoa.__all__ if name.endswith("Error")]
    assert len(errors) > 1
    assert all(issubclass(error, smoa.SmoaError) for error in errors)


def test_the_version_is_that_of_the_package() -> None:
    assert smoa.__version__ == importlib.metadata.version("smoa")


def test_the_citation_names_the_same_version() -> None:
    citation = yaml.safe_load((SOURCE.parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == smoa.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()
