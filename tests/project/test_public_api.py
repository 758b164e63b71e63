"""What `import smoa` promises: names, version, types, errors."""

import importlib
import importlib.metadata
from pathlib import Path

import yaml

import smoa
from smoa.errors import SmoaError

SOURCE = Path(smoa.__file__).parent


def test_all_is_what_is_exported() -> None:
    assert smoa.__all__ == sorted(set(smoa.__all__))
    submodules = {path.stem for path in SOURCE.iterdir()} - {"merged"}
    exported = {name for name in vars(smoa) if not name.startswith("_")} - submodules
    plumbing = {"annotations", "ensure_peft_type", "register", "save_as_later_versions"}
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
    }
