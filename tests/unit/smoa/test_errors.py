from __future__ import annotations

import re

import smoa
from smoa import errors
from smoa.errors import SmoaError

TREE = dict(re.findall(r"^[├└]── (\w+)\((\w+)\)", errors.__doc__ or "", flags=re.MULTILINE))


def test_the_tree_shows_every_error() -> None:
    assert {"SmoaError", *TREE} == set(errors.__all__)
    assert set(TREE) == {error.__name__ for error in SmoaError.__subclasses__()}


def test_every_error_is_a_smoa_error_and_the_builtin_that_fits() -> None:
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
