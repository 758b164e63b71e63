"""What `import smoa` promises: names, version, types, errors, and that others' notes stay out of the command."""

import importlib
import importlib.metadata
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import smoa
from smoa._quiet import NOTES
from smoa.errors import SmoaError

SOURCE = Path(smoa.__file__).parent


def test_all_is_what_is_exported() -> None:
    assert smoa.__all__ == sorted(set(smoa.__all__))
    submodules = {path.stem for path in SOURCE.iterdir()}
    exported = {name for name in vars(smoa) if not name.startswith("_")} - submodules
    plumbing = {"annotations", "ensure_peft_type", "register", "save_biases"}
    assert exported - plumbing == set(smoa.__all__)


def test_the_version_is_that_of_the_package() -> None:
    assert smoa.__version__ == importlib.metadata.version("smoa")
    citation = yaml.safe_load((SOURCE.parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == smoa.__version__
    assert (SOURCE / "py.typed").is_file()


def test_every_error_is_exported_and_the_builtin_that_fits() -> None:
    assert {error.__name__ for error in SmoaError.__subclasses__()} < set(smoa.__all__)
    assert {name: getattr(smoa, name).__mro__[2] for name in smoa.__all__ if name.endswith("Error")} == {
        "AdapterFileError": ValueError,
        "ConfigError": ValueError,
        "DataError": ValueError,
        "MergeError": ValueError,
        "PartitionError": ValueError,
        "SmoaError": BaseException,
        "UnsupportedModuleError": TypeError,
        "UnsupportedVersionError": ImportError,
    }


@pytest.mark.parametrize(
    ("modules", "argv", "dropped"),
    [
        (["smoa_lab"], ["train.py"], True),
        ([], ["-m", "data"], True),  # while Python looks for the __main__ of `python -m smoa`
        ([], ["train.py"], False),
    ],
    ids=["the lab", "python -m smoa", "a program that only uses the library"],
)
def test_only_the_known_notes_are_dropped_and_only_in_the_lab(
    modules: list[str], argv: list[str], dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "smoa_lab", raising=False)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys, "argv", argv)
    for name, note in NOTES.items():
        logger = logging.getLogger(name)
        texts = [f"{note}: an end that changes", f"{name} has news"]
        shown = [bool(logger.filter(logger.makeRecord(name, logging.INFO, "", 1, text, (), None))) for text in texts]
        assert shown == [not dropped, True]
