import dataclasses

import pytest

from smoa_lab.data.formats import shape
from smoa_lab.data.row import Message, Row, row_from_json
from tests.support import lab

ASKED, ANSWERED = (Message("user", "é\n"),), (Message("assistant", "b"),)
(QUESTION,) = (shape(row, "choices") for row in lab.questions(1, "train"))


@pytest.mark.parametrize("row", [Row(ASKED, ANSWERED), Row("a", "b"), QUESTION])
def test_a_row_survives_json(row: Row) -> None:
    assert row_from_json(row.to_json()) == row


def test_the_digest_looks_past_format_white_space_case_and_composition_and_at_nothing_else() -> None:
    assert Row("", "One two.").digest == Row("", "  one\n\tTWO. ").digest
    assert Row("é", "B").digest == Row(ASKED, ANSWERED).digest == Row((), ASKED + ANSWERED).digest
    composed, decomposed = Row("Café", "Ǆ가"), Row("Cafe\u0301", "Ǆ\u1100\u1161")
    assert (composed.digest, composed.key, composed.asked) == (decomposed.digest, decomposed.key, decomposed.asked)
    turned = dataclasses.replace(QUESTION, choices=QUESTION.choices[::-1], label=1, part="test")
    assert QUESTION.digest == turned.digest
    other = dataclasses.replace(QUESTION, completion=(Message("assistant", "0"),))
    others = [
        *(Row("", "One two."), Row("", "One, two."), Row("One", "two.")),
        *(QUESTION, other, dataclasses.replace(QUESTION, choices=("1",))),
    ]
    assert len({row.digest for row in others}) == len(others)
    answered = dataclasses.replace(QUESTION, choices=(), label=None)  # as a conversation
    assert (answered.key == QUESTION.key, answered.digest == QUESTION.digest) == (True, False)


def test_the_digests_that_split_rows_stay_as_they_are() -> None:
    rows = Row("", "One two."), Row(ASKED, ANSWERED), QUESTION
    assert [row.digest[:12] for row in rows] == ["28840c942d20", "36e241bb2a6f", "81f08d251301"]


def test_rows_of_one_prompt_or_of_equal_turns_before_the_first_answer_belong_together() -> None:
    def talk(*said: str) -> Row:
        roles = ("user", "assistant") * 2
        return Row((), tuple(Message(role, text) for role, text in zip(roles, said, strict=False)))

    assert Row("Why?", "So.").asked == Row(" why? ", "Because.").asked != Row("Who?", "So.").asked
    assert talk("Why?", "So.").asked == talk("Why?", "Thus.", "And?", "No.").asked != talk("Who?", "So.").asked
    assert Row("", "A story.").asked == Row("", "A story.").key
