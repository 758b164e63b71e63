"""Scores of held-out questions and rows, and what changed between two stages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoa_lab.data.encoding import IGNORED, Encoder, Tokens
from smoa_lab.data.rows import Message, Row, choice_question, question
from smoa_lab.scoring.evaluation import (
    Evaluation,
    Outcome,
    _of_choices,
    _of_free_answer,
    answer_outcomes,
    score_outcomes,
)
from smoa_lab.scoring.losses import Losses, Score, proportion, score
from tests.support import lab
from tests.support.own_rows import MARKED, tiny_chat_model, tokenizer_with

FREE = question("own", "1", "How many are two and two?", "four")


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(lab.byte_tokenizer())


def test_a_free_answer_is_scored_without_its_end_token(model: PreTrainedModel, encoder: Encoder) -> None:
    scores = score_outcomes(answer_outcomes(model, encoder, [FREE]))["own"]
    (whole,) = score(model, [encoder.gold(FREE)], encoder.pad, 100)
    assert scores.gold_loss == pytest.approx(whole.loss / len("four"))
    assert scores.accuracy_norm is scores.majority is None


def test_answers_that_fill_the_length_are_scored_without_a_bos_token(model: PreTrainedModel) -> None:
    encoder = Encoder(lab.byte_tokenizer(adds_bos=False), max_length=32)
    long = choice_question("own", "1", "Say it.", ["x" * 40, "yes"], 0)
    (outcome,) = answer_outcomes(model, encoder, [long])
    assert outcome.gold_tokens == 31
    (outcome,) = answer_outcomes(model, encoder, [question("own", "1", "Say it.", "x" * 40)])
    assert outcome.gold_tokens == 31  # the end token was cut


@pytest.mark.parametrize("greedy", [True, False])
def test_a_free_answer_is_right_where_greedy_decoding_gives_it(greedy: bool) -> None:
    outcome = _of_free_answer(FREE, Score((1.0, 2.0, 0.5), greedy), Tokens([1, 2, 3, 4], [IGNORED, 2, 3, 4]))
    assert (outcome.gold_nll, outcome.gold_tokens) == (3.0, 2)
    assert outcome.right == outcome.right_norm == greedy
    cut = _of_free_answer(FREE, Score((1.0, 2.0), greedy), Tokens([1, 2, 3], [IGNORED, 2, 3], answer_cut=2))
    assert (cut.gold_nll, cut.gold_tokens, cut.right) == (3.0, 2, False)  # it has no end token


def test_of_choices_the_likeliest_is_taken_in_all_and_per_character() -> None:
    record = choice_question("own", "1", "Which?", ["no", "certainly"], 1)
    outcome = _of_choices(record, [Score((1.0, 1.0), False), Score((3.0,), False)], [2, 9])
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


RECORDS = lab.questions(3, "test")


def test_a_sample_has_question_reference_and_what_was_written_at_each_stage(
    model: PreTrainedModel, encoder: Encoder
) -> None:
    evaluation = Evaluation(encoder, RECORDS, samples=2)
    evaluation.measure(model, "after")
    assert len(evaluation.samples) == 2
    assert evaluation.samples[0].keys() == {"question", "reference", "after"}
    assert evaluation.samples[0]["reference"] == RECORDS[0].completion
    assert "\n" not in evaluation.samples[0]["after"]
    evaluation.measure(model, "before")
    assert evaluation.samples[1]["before"] == evaluation.samples[1]["after"]
    assert evaluation.evaluation["before"] == evaluation.evaluation["after"]
    assert evaluation.gain == {"accuracy": 0.0, "accuracy_stderr": 0.0}
    scores = evaluation.evaluation["after"]["all"]
    assert evaluation.measured(model).mean == pytest.approx(scores["gold_loss"], rel=1e-5)
    assert math.exp(scores["gold_loss"]) == scores["perplexity"]


def test_without_rows_nothing_is_measured_and_without_samples_nothing_written(
    model: PreTrainedModel, encoder: Encoder
) -> None:
    without = Evaluation(encoder, [], samples=3)
    without.measure(model, "before")
    assert (without.evaluation, without.samples, without.gain) == ({}, [], None)
    evaluation = Evaluation(encoder, RECORDS, baseline=False)
    evaluation.measure(model, "before")
    assert evaluation.evaluation == {}
    evaluation.measure(model, "after")
    assert evaluation.samples == []
    assert evaluation.evaluation["after"]["all"]["questions"] == 3


def test_the_gain_is_paired_by_question(encoder: Encoder) -> None:
    evaluation = Evaluation(encoder, RECORDS)
    for stage, hits in (("before", (0, 1, 0)), ("after", (1, 1, 0))):
        evaluation.outcomes[stage] = [
            Outcome(row, 1.0, 1, bool(hit), bool(hit)) for row, hit in zip(RECORDS, hits, strict=True)
        ]
    assert evaluation.gain == pytest.approx({"accuracy": 1 / 3, "accuracy_stderr": (2 / 3 / 2 / 3) ** 0.5})


ASKED = (Message("user", "Open?"),)
PAIRS = [
    Row(ASKED, (Message("assistant", "Yes, till six."),), (Message("assistant", "Nope."),)),
    Row(ASKED, (Message("assistant", "Until six."),), (Message("assistant", "Never, go away."),)),
]


def of_turns(max_length: int | None = None) -> Encoder:
    return Encoder(tokenizer_with(MARKED), max_length)


def test_a_model_to_which_all_tokens_are_alike_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_chat_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    evaluation = Evaluation(of_turns(), [Row("", "Open at nine."), Row("", "Closed.")], samples=1)
    evaluation.measure(model, "before")
    scores = evaluation.evaluation["before"]["all"]
    assert scores["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert scores["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)
    assert scores["rows"] == 2
    assert evaluation.gain is None
    assert Losses([5000.0], [5]).perplexity == math.inf  # which no float holds
    assert [set(sample) for sample in evaluation.samples] == [{"question", "reference", "before"}]


def test_preferred_is_the_share_of_pairs_whose_chosen_answer_gained_on_the_rejected_one() -> None:
    evaluation, model = Evaluation(of_turns(), PAIRS), tiny_chat_model()
    evaluation.measure(model, "before")
    evaluation.measure(model, "after")
    assert evaluation.gain is not None
    assert evaluation.gain["preferred"] == 0  # nothing changed
    evaluation.rejected_losses["after"].nll[0] += 1.0  # the first rejected answer became less likely
    assert evaluation.gain["preferred"] == 0.5


def test_rejected_answers_are_cut_as_the_rows_were() -> None:
    whole, cut = Evaluation(of_turns(), PAIRS).rejected, Evaluation(of_turns(40), PAIRS).rejected
    assert [row.input_ids[:40] for row in whole] == [row.input_ids for row in cut]
    assert len(whole[1].input_ids) > 40
