"""Scores of held-out questions and rows, and what changed between two stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from smoa_lab.data.encoding import IGNORED, Encoder, Tokens
from smoa_lab.data.rows import Message, Row, candidates, choice_question, question
from smoa_lab.scoring import evaluation as evaluation_module
from smoa_lab.scoring.evaluation import (
    Evaluation,
    Forgetting,
    Outcome,
    _of_free_answer,
    answer_outcomes,
    at_least,
    score_outcomes,
    text_length,
    text_losses,
)
from smoa_lab.scoring.losses import Losses, Score, score
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


@pytest.mark.parametrize("style", ["text", "label"])
def test_accuracies_are_those_of_lm_eval(style: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    class Naive(LM):
        """One answer at a time, all logits."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [self.scored(*request.args) for request in requests]

        @torch.no_grad()
        def scored(self, prompt: str, answer: str) -> tuple[float, bool]:
            ids = torch.tensor([encoder.tokenizer(prompt + answer)["input_ids"]])
            logits, wanted = model(ids).logits[0, -len(answer) - 1 : -1], ids[0, -len(answer) :]
            greedy = bool((logits.argmax(-1) == wanted).all())
            return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()), greedy

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    questions = lab.questions(12, "test")
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    encoder = Encoder(lab.byte_tokenizer(), None, style=style)
    rows = [
        {"prompt": encoder.question_text(row), "choices": candidates(row, encoder.style), "label": row.label}
        for row in questions
    ]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = ConfigurableTask(
        config={
            "task": "sums",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": metrics,
        }
    )
    theirs: Any = simple_evaluate(
        Naive(), tasks=[task], task_manager=TaskManager(include_defaults=False), log_samples=False
    )["results"]["sums"]
    ours = score_outcomes(answer_outcomes(model, encoder, questions))["all"]
    for name, value in (("acc", ours.accuracy), ("acc_norm", ours.accuracy_norm)):
        assert theirs[f"{name},none"] == pytest.approx(value)
    assert theirs["acc_stderr,none"] == pytest.approx(ours.accuracy_stderr)


TEXTS = ["A short text.", "A text that is rather longer than the others are.", "Another text."]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_every_token_of_a_text_is_scored(adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = lab.byte_tokenizer(adds_bos)
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path)).eval()
    found = text_losses(model, tokenizer, TEXTS)
    assert found.tokens == [len(text) - (not adds_bos) for text in TEXTS]  # a byte is a token
    for text, nll in zip(TEXTS, found.nll, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        assert nll == pytest.approx(float(cross_entropy(logits[:-1], ids[1:], reduction="sum")), rel=1e-4)


def test_a_long_text_is_cut_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "TEXT_TOKENS", 11)
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    tokenizer = lab.byte_tokenizer()
    found = text_losses(model, tokenizer, [TEXTS[1]])
    assert found.tokens == [10]  # beside the BOS token
    assert found.nll == pytest.approx(text_losses(model, tokenizer, [TEXTS[1][:10]]).nll)
    few: Any = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path / "gpt2", positions=10))
    assert text_losses(few, tokenizer, [TEXTS[1]]).tokens == [9]  # and at the model's positions
    assert (text_length(few.config), text_length(BloomConfig())) == (10, 11)


def test_texts_are_taken_until_there_are_enough_tokens() -> None:
    tokenizer = lab.byte_tokenizer(adds_bos=False)
    assert at_least(tokenizer, TEXTS, 14, 256) == TEXTS[:2]  # the first has 13
    assert at_least(tokenizer, TEXTS, 13, 256) == TEXTS[:1]
    assert at_least(tokenizer, TEXTS, 13, 12) == TEXTS[:2]  # 12 of each
    assert at_least(tokenizer, TEXTS, 1000, 256) == TEXTS
    assert at_least(tokenizer, TEXTS, 0, 256) == []


def test_what_is_forgotten_is_the_change_of_the_loss_on_the_same_text(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))
    measured = Forgetting("packaged", 600, lab.byte_tokenizer(), model.config)
    measured.measure(model, "before")
    assert measured.metrics is None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every byte is as likely as any other
    measured.measure(model, "after")
    found = measured.metrics
    assert found is not None
    assert found["after"] == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=1e-5)
    assert found["change"] == pytest.approx(found["after"] - found["before"])
    assert (found["passages"], found["tokens"]) == (3, 3 * 255)  # 256 tokens each, and the first is given
    assert found["text"] == "Jules and Michel Verne, In the Year 2889"
    assert found["stderr"] > 0


def test_nothing_is_measured_where_no_tokens_are_asked_for() -> None:
    measured = Forgetting("no/such/file", 0, lab.byte_tokenizer(), GPT2Config())
    measured.measure(None, "before")
    measured.measure(None, "after")
    assert measured.metrics is None
