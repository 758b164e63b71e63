from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from smoa_lab.lessons.row_looks import RowLooks
from smoa_lab.rows.formats import Example, Passage, Preference
from smoa_lab.rows.plain_examples import plain_example
from smoa_lab.rows.turns import Message
from smoa_lab.scoring.row_losses import Losses
from smoa_lab.tokens.encoding import RowEncoder
from tests.support.own_rows import MARKED, tiny_chat_model, tokenizer_with

ASKED = (Message("user", "Open?"),)
PAIRS = [
    Preference(ASKED, (Message("assistant", "Yes, till six."),), (Message("assistant", "Nope."),)),
    Preference(ASKED, (Message("assistant", "Until six."),), (Message("assistant", "Never, go away."),)),
]


@pytest.fixture
def encoder() -> RowEncoder:
    return RowEncoder(tokenizer_with(MARKED))


def held_out(encoder: RowEncoder, *examples: Example) -> Any:
    encoded = [encoder.encode(example) for example in examples]
    return Dataset.from_dict(
        {
            "input_ids": [tokens.input_ids for tokens in encoded],
            "labels": [tokens.labels for tokens in encoded],
            "example": [json.dumps(plain_example(example)) for example in examples],
        }
    )


def test_a_model_to_which_all_tokens_are_alike_has_the_perplexity_of_its_vocabulary(encoder: RowEncoder) -> None:
    model = tiny_chat_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    looks = RowLooks(held_out(encoder, Passage("Open at nine."), Passage("Closed.")), encoder, None, samples=1)
    looks.look(model, "before")
    scores = looks.evaluation["before"]["all"]
    assert scores["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert scores["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)
    assert scores["rows"] == 2
    assert looks.gain is None
    assert [set(sample) for sample in looks.samples] == [{"question", "reference", "before"}]


def test_a_perplexity_that_no_float_holds_is_infinite(encoder: RowEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = RowLooks(held_out(encoder, Passage("Open at nine.")), encoder, None, samples=0)
    monkeypatch.setattr(looks, "measured", lambda model: Losses([5000.0], [5]))
    looks.look(tiny_chat_model(), "after")
    assert looks.evaluation["after"]["all"]["loss"] == 1000
    assert looks.evaluation["after"]["all"]["perplexity"] == math.inf


def test_preferred_is_the_share_of_pairs_whose_chosen_answer_gained_on_the_rejected_one(encoder: RowEncoder) -> None:
    looks = RowLooks(held_out(encoder, *PAIRS), encoder, None, samples=0)
    model = tiny_chat_model()
    looks.look(model, "before")
    looks.look(model, "after")
    assert looks.gain is not None
    assert looks.gain["preferred"] == 0  # nothing changed
    looks.worse["after"].nll[0] += 1.0  # the first rejected answer became less likely
    assert looks.gain["preferred"] == 0.5


def test_rejected_answers_are_cut_as_the_rows_were(encoder: RowEncoder) -> None:
    whole = RowLooks(held_out(encoder, *PAIRS), encoder, None, samples=0).rejected
    cut = RowLooks(held_out(encoder, *PAIRS), encoder, 40, samples=0).rejected
    assert [row["input_ids"][:40] for row in whole] == [row["input_ids"] for row in cut]
    assert len(whole[1]["input_ids"]) > 40


def test_without_rows_nothing_is_looked_at(encoder: RowEncoder) -> None:
    looks = RowLooks(held_out(encoder, *PAIRS).select([]), encoder, None, samples=3)
    looks.look(None, "before")
    looks.look(None, "after")
    assert (looks.evaluation, looks.gain, looks.samples) == ({}, None, [])
