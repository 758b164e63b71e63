from __future__ import annotations

from typing import get_args

import smoa.export.merge
from smoa_lab.cli import merge


def test_the_choices_of_a_dtype_are_the_librarys() -> None:
    assert get_args(merge.Dtype) == get_args(smoa.export.merge.Dtype)
