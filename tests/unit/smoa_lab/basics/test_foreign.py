from __future__ import annotations

import warnings

import pytest

from smoa_lab.basics.foreign import foreign_warnings_ignored


def test_only_warnings_between_other_libraries_are_silenced_and_only_within_the_block() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with foreign_warnings_ignored():
            warnings.warn("`gradient_checkpointing_enable` is deprecated and will go", FutureWarning, stacklevel=1)
            with pytest.raises(FutureWarning, match="something else"):
                warnings.warn("something else", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="gradient"):
            warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
