from __future__ import annotations

import pytest

from smoa.experiments.data.records import Record, choice_record
from smoa.experiments.generation import extract_choice, extract_number, token_f1

PIQA = choice_record("piqa", "1", "Cut it.", ["a saw", "glue"], 0)
BOOLQ = choice_record("boolq", "2", "is water wet", ["yes", "no"], 0)
SUM = Record("gsm8k", "3", "How many?", "16 - 4 = <<16-4=12>>12\n#### 12")


@pytest.mark.parametrize(
    ("record", "text", "found"),
    [
        (PIQA, "the correct answer is solution2", "solution2"),
        (PIQA, "solution1 and not solution2", "solution1"),
        (PIQA, "answer1", None),
        (BOOLQ, "the correct answer is true", "true"),
        (BOOLQ, "True", None),
        (BOOLQ, "", None),
    ],
)
def test_the_label_is_the_first_match_of_the_tasks_own(record: Record, text: str, found: str | None) -> None:
    assert extract_choice(record, text, "label") == found


def test_in_the_text_style_the_text_must_be_a_choice() -> None:
    assert extract_choice(PIQA, " A  saw\n", "text") == "a saw"
    assert extract_choice(PIQA, "a saw, I think", "text") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 1,234", "1234"), ("it is 3.50", "3.5"), ("-7 apples", "-7"), ("12 then 12.0", "12"), ("none", None)],
)
def test_the_number_is_the_last_one(text: str, number: str | None) -> None:
    assert extract_number(SUM, text, "text") == number


def test_the_gold_solution_ends_in_its_number() -> None:
    assert extract_number(SUM, SUM.answer, "text") == "12"


def test_token_f1_counts_common_words() -> None:
    assert token_f1("The cat sat.", "the cat") == pytest.approx(0.8)
    assert token_f1("dog", "cat") == 0.0
