"""Whether an answer is right."""

import pytest

from smoa_lab.data.answers import RULES


@pytest.mark.parametrize(
    ("metric", "answer", "completion", "is_right"),
    [
        ("exact", " It is 4.\n", "It is  4.", True),
        ("exact", "it is 4.", "It is 4.", False),
        ("contains", "I think it is\n4, or so", "it is 4", True),
        ("contains", "it is", "it is 4", False),
        ("number", "2 + 2 = 4.", "#### 4", True),
        ("number", "4, and not 5", "4", False),
        ("number", "It costs $1,234,567.50", "1234567.5", True),
        ("number", "5-3", "3", True),
        ("number", "x = -3", "3", False),
        ("number", "x = \u22123", "-3", True),
        ("number", ".5", "0.50", True),
        ("number", "6.02e23", "6.02E+23", True),
        ("number", "6.02e23", "23", False),
        ("number", "1.5e\u22123", "0.0015", True),
        ("number", "1e99999999999999999999", "2", False),  # more than a Decimal has
        ("number", "none", "4", False),
        ("number", "none", "none", False),
    ],
)
def test_answers_are_compared_by_the_rule(metric: str, answer: str, completion: str, is_right: bool) -> None:
    assert RULES[metric](answer, completion) is is_right
