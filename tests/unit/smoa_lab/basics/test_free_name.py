from __future__ import annotations

import pytest

from smoa_lab.basics.free_name import free_name


@pytest.mark.parametrize(
    ("taken", "found"),
    [(set(), "run"), ({"run"}, "run-2"), ({"run", "run-2", "run-4"}, "run-3"), ({"run-2"}, "run")],
)
def test_the_first_free_name_is_taken(taken: set[str], found: str) -> None:
    assert free_name("run", taken.__contains__) == found
