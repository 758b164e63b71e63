from __future__ import annotations

from smoa_lab.basics.nearest import LISTED, nearest


def test_a_name_like_none_is_answered_with_all_where_they_are_few() -> None:
    few, many = ["one", "two"], [f"name{i}" for i in range(LISTED + 1)]
    assert nearest("zzz", few) == "; choose from one, two"
    assert nearest("zzz", many) == nearest("zzz", []) == ""
    assert nearest("nam3", many).endswith("did you mean 'name3'?")
