from __future__ import annotations

from smoa_lab.config.problems import listed


def test_problems_are_counted_and_listed_one_a_line() -> None:
    assert listed(["a: is missing"]) == "1 problem\n  a: is missing"
    assert listed(["a", "b"]) == "2 problems\n  a\n  b"
