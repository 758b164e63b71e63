from __future__ import annotations

import json
from typing import Any

import pytest

from smoa_lab.rows.formats import Conversation, Passage, Preference
from smoa_lab.rows.plain_examples import content_digest, example_of, plain_example, read_examples
from smoa_lab.rows.turns import Message


@pytest.mark.parametrize(
    "example",
    [
        Conversation((Message("user", "é\n"), Message("assistant", "b")), prompt_turns=1),
        Passage("text", "prompt"),
        Preference("a", "b", "c"),
        Preference((Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),)),
    ],
)
def test_an_example_survives_json(example: Any) -> None:
    text = json.dumps(plain_example(example))
    assert example_of(json.loads(text)) == example
    assert read_examples([text]) == [example]


def test_the_digest_looks_past_white_space_and_case_and_at_nothing_else() -> None:
    digest = content_digest(Passage("One two."))
    assert digest == content_digest(Passage("  one\n\tTWO. "))
    assert digest != content_digest(Passage("One, two."))
    assert digest != content_digest(Passage("two.", "One"))
