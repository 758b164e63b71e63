from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoa_lab.data.prompts import Encoded, PromptEncoder
from smoa_lab.data.records import Record, choice_record
from smoa_lab.scoring.held_out import Outcome, _of_choices, _of_free_answer, answer_outcomes, proportion, score_outcomes
from smoa_lab.scoring.likelihood import AnswerScore, score_answers
from tests.support import lab

FREE = Record("own", "1", "How many are two and two?", "four")


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(lab.byte_tokenizer())


def test_a_free_answer_is_scored_without_its_end_token(model: PreTrainedModel, encoder: PromptEncoder) -> None:
    scores = score_outcomes(answer_outcomes(model, encoder, [FREE]))["own"]
    (whole,) = score_answers(model, [encoder.gold(FREE)], encoder.pad, 100)
    assert scores.gold_loss == pytest.approx(whole.loss / len("four"))
    assert scores.accuracy_norm is scores.majority is None


def test_answers_that_fill_the_length_are_scored_without_a_bos_token(model: PreTrainedModel) -> None:
    encoder = PromptEncoder(lab.byte_tokenizer(adds_bos=False), max_length=32)
    long = choice_record("own", "1", "Say it.", ["x" * 40, "yes"], 0)
    (outcome,) = answer_outcomes(model, encoder, [long])
    assert outcome.gold_tokens == 31
    (outcome,) = answer_outcomes(model, encoder, [Record("own", "1", "Say it.", "x" * 40)])
    assert outcome.gold_tokens == 31  # the end token was cut


@pytest.mark.parametrize("greedy", [True, False])
def test_a_free_answer_is_right_where_greedy_decoding_gives_it(greedy: bool) -> None:
    outcome = _of_free_answer(FREE, AnswerScore((1.0, 2.0, 0.5), greedy), Encoded([1], [2, 3, 4]))
    assert (outcome.gold_nll, outcome.gold_tokens) == (3.0, 2)
    assert outcome.right == outcome.right_norm == greedy


def test_a_free_answer_that_was_cut_has_no_end_token_and_is_never_right() -> None:
    outcome = _of_free_answer(FREE, AnswerScore((1.0, 2.0), True), Encoded([1], [2, 3], answer_cut=2))
    assert (outcome.gold_nll, outcome.gold_tokens, outcome.right) == (3.0, 2, False)


def test_of_choices_the_likeliest_is_taken_in_all_and_per_character() -> None:
    record = choice_record("own", "1", "Which?", ["no", "certainly"], 1)
    outcome = _of_choices(record, [AnswerScore((1.0, 1.0), False), AnswerScore((3.0,), False)], [2, 9])
    assert (outcome.gold_nll, outcome.gold_tokens) == (3.0, 1)
    assert (outcome.right, outcome.right_norm) == (False, True)


def test_tasks_are_scored_alone_and_together() -> None:
    arc, piqa = lab.questions(2, "test"), lab.questions(4, "test", "piqa")
    outcomes = [Outcome(record, 2.0, 1, True, False) for record in arc]
    outcomes += [Outcome(record, 3.0, 3, False, True) for record in piqa]
    scores = score_outcomes(outcomes)
    assert list(scores) == ["arc_easy", "piqa", "all"]
    assert (scores["arc_easy"].gold_loss, scores["piqa"].gold_loss) == (2.0, 1.0)
    assert scores["all"].gold_loss == pytest.approx((2 * 2 + 4 * 3) / (2 + 12))
    assert (scores["all"].accuracy, scores["all"].accuracy_norm) == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert scores["all"].majority == 1.0


def test_choices_beside_free_answers_leave_only_what_both_have() -> None:
    scores = score_outcomes(
        [Outcome(lab.questions(1, "test")[0], 1.0, 1, True, True), Outcome(FREE, 1.0, 1, True, True)]
    )
    assert scores["arc_easy"].accuracy_norm == 1.0
    assert scores["own"].accuracy_norm is None
    assert scores["all"].accuracy_norm is None


def test_one_question_has_no_spread() -> None:
    assert proportion([True]) == (1.0, 0.0)
    assert proportion([True, False]) == (0.5, 0.5)
