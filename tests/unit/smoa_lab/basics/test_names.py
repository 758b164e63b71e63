from __future__ import annotations

import pytest

from smoa_lab.basics.names import LISTED, free_name, nearest


def test_a_name_like_none_is_answered_with_all_where_they_are_few() -> None:
    few, many = ["one", "two"], [f"name{i}" for i in range(LISTED + 1)]
    assert nearest("zzz", few) == "; choose from one, two"
    assert nearest("zzz", many) == nearest("zzz", []) == ""
    assert nearest("nam3", many).endswith("did you mean 'name3'?")


@pytest.mark.parametrize(
    ("taken", "found"),
    [(set(), "run"), ({"run"}, "run-2"), ({"run", "run-2", "run-4"}, "run-3"), ({"run-2"}, "run")],
)
def test_the_first_free_name_is_taken(taken: set[str], found: str) -> None:
    assert free_name("run", taken.__contains__) == found
