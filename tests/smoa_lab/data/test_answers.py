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
        ("number", "none", "4", False),
        ("number", "none", "none", False),
        ("number", "1/4", "3/4", False),
        ("number", "6/8", "3/4", True),
        ("number", "-1/2", "-0.5", True),
        ("number", "7 m2", "12 m2", False),
        ("number", "12 m2", "12", True),
        ("number", "So 3.\n#### 7 apples", "7", True),
        ("number", "#### 1,000", "1000", True),
        ("number", "In 2024 3/4", "3/4", True),
        ("number", "-$5", "5", False),
        ("number", "-$5", "-5", True),
        ("number", "#### (9, 4)", "#### (3, 4)", False),
        ("number", "so (3, 4)", "#### (3, 4)", True),
        ("contains", "irrelevant", "relevant", False),
        ("contains", "It is relevant.", "relevant", True),
        ("contains", "female", "male", False),
        ("contains", "14", "4", False),
        ("contains", "1.4", "4", False),
        ("contains", "4.5", "4", False),
        ("contains", "-4", "4", False),
        ("contains", "It is not toxic", "not toxic", True),
        ("contains", "non-toxic", "toxic", False),
        ("contains", "C++", "C++", True),
        ("contains", "caf\u00e9", "cafe\u0301", True),
        ("exact", "cafe\u0301", "caf\u00e9", True),
    ],
)
def test_answers_are_compared_by_the_rule(metric: str, answer: str, completion: str, is_right: bool) -> None:
    assert RULES[metric](answer, completion) is is_right
