from __future__ import annotations

import dataclasses
import json
import re

import pytest

from smoa.errors import DataError
from smoa_lab.data.rows import (
    Message,
    Row,
    choice_question,
    content_hash,
    question,
    question_values,
    row_from_json,
    split,
)
from tests.support import lab


def test_a_question_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(DataError, match=re.escape("arc_easy, record 7: label 2 is outside its 2 choices")):
        choice_question("arc_easy", "7", "Which?", ["a", "b"], 2)
    with pytest.raises(DataError, match="must not be empty"):
        question("own", "1", "  ", "answer")
    with pytest.raises(DataError, match="is not choice number 0"):
        question("own", "1", "Which?", "b", ("a", "b"), 0)


ASKED, ANSWERED = (Message("user", "é\n"),), (Message("assistant", "b"),)


@pytest.mark.parametrize("row", [Row(ASKED, ANSWERED), Row("a", "b", "c"), *lab.questions(1, "train")])
def test_a_row_survives_json(row: Row) -> None:
    assert row_from_json(row.to_json()) == row
    if row.task:
        assert question(**json.loads(json.dumps(question_values(row)))) == row


def test_the_digest_looks_past_white_space_and_case_and_at_nothing_else() -> None:
    digest = Row("", "One two.").digest
    assert digest == Row("", "  one\n\tTWO. ").digest
    assert digest != Row("", "One, two.").digest
    assert digest != Row("One", "two.").digest


def test_the_digests_that_split_rows_of_earlier_releases_are_the_same() -> None:
    rows = Row("", "One two."), Row(ASKED, ANSWERED), Row("a", "b", "c")
    assert [row.digest[:12] for row in rows] == ["01f7936b690f", "cf5e93649966", "29c3fbde8470"]


def test_training_questions_that_the_test_part_has_are_dropped_and_counted() -> None:
    train, test = lab.questions(10, "train"), lab.questions(3, "test")
    leaked = dataclasses.replace(test[0], id="other", prompt=test[0].prompt.upper() + "  ")
    parts = split([*train, leaked, train[0]], test, validation_part=0.2)
    assert (parts.also_in_test, parts.repeated) == (1, 1)
    assert len(parts.train) == 8
    assert len(parts.validation) == 2
    assert parts.test == test


def test_the_validation_part_comes_from_training_and_the_cut_is_always_the_same() -> None:
    train, test = lab.questions(20, "train"), lab.questions(5, "test")
    parts = split(train, test, 0.25)
    assert {r.id for r in parts.validation} < {r.id for r in train}
    assert not {r.id for r in parts.validation} & {r.id for r in parts.train}
    assert split(train, test, 0.25) == parts


def test_the_content_hash_ignores_identifiers_and_nothing_else() -> None:
    records = lab.questions(3, "train")
    renamed = [dataclasses.replace(record, id=f"x{record.id}") for record in records]
    assert content_hash(renamed) == content_hash(records)
    assert content_hash(records[::-1]) != content_hash(records)
    assert content_hash([dataclasses.replace(records[0], prompt="Other?"), *records[1:]]) != content_hash(records)
