"""Scores of held-out rows, and what changed between two stages."""

import dataclasses
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from smoa.errors import DataError
from smoa_lab.data.answers import own_metric
from smoa_lab.data.chat_templates import set_chat_template
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.formats import shape
from smoa_lab.data.row import Message, Row
from smoa_lab.scoring import evaluation as evaluation_module
from smoa_lab.scoring.evaluation import (
    Evaluation,
    Forgetting,
    Measured,
    Stage,
    continue_prompts,
    ends_of,
)
from smoa_lab.scoring.losses import Losses, row_losses
from tests.support import lab, tiny
from tests.support.lab import MARKED, named, tiny_chat_model, tokenizer_with

QUESTIONS = [shape(row, "choices") for row in lab.questions(12, "test")]
ASKED = (Message("user", "Open?"),)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lab.tiny_base(tmp_path))


def of_questions() -> Encoder:
    tokenizer = lab.byte_tokenizer()
    set_chat_template(tokenizer, "alpaca")
    return Encoder(tokenizer, None)


def of_turns(max_length: int | None = None) -> Encoder:
    return Encoder(tokenizer_with(MARKED), max_length)


def scores_of(encoder: Encoder, rows: list[Row], model: Any) -> dict[str, Any]:
    evaluation = Evaluation(encoder, rows)
    evaluation.measure(model, "after")
    return evaluation.scores()["after"]


def given(rows: list[Row], before: Measured, after: Measured, encoder: Encoder | None = None) -> Evaluation:
    """An evaluation of what models made of rows."""
    evaluation = Evaluation(encoder or of_questions(), rows)
    evaluation.measured = {"before": before, "after": after}
    return evaluation


def test_of_choices_the_right_ones_loss_is_taken_without_what_ends_it(model: PreTrainedModel) -> None:
    encoder = of_questions()
    right = [encoder.choices(row)[1] for row in QUESTIONS]
    alone = row_losses(model, right, encoder.pad)
    found = Evaluation(encoder, QUESTIONS).measure_once(model)
    assert found.losses.nll == pytest.approx(alone.nll, rel=1e-4)
    assert found.losses.tokens == alone.tokens == [len(row.choices[1]) for row in QUESTIONS]
    scores = scores_of(encoder, [dataclasses.replace(QUESTIONS[0], label=0), *QUESTIONS[1:]], model)
    assert scores["majority"] == 11 / 12
    orders = [["yes", "no"], ["no", "yes"]]
    yes = [shape({"prompt": "Open?", "choices": orders[n % 2], "label": n % 2}, "choices") for n in range(4)]
    assert scores_of(encoder, yes, model)["majority"] == 1
    assert scores["rows"] == 12


def test_a_sample_has_question_reference_and_what_was_written_at_each_stage(model: PreTrainedModel) -> None:
    evaluation = Evaluation(of_questions(), QUESTIONS[:3], samples=2)
    evaluation.measure(model, "after")
    assert len(evaluation.samples) == 2
    assert evaluation.samples[0].keys() == {"question", "reference", "after"}
    assert evaluation.samples[0]["reference"] == QUESTIONS[0].choices[1]
    evaluation.measure(model, "before")
    assert evaluation.samples[1]["before"] == evaluation.samples[1]["after"]
    assert evaluation.scores()["before"] == evaluation.scores()["after"]
    assert evaluation.gain == {"loss": 0.0, "loss_stderr": 0.0, "accuracy": 0.0, "accuracy_stderr": 0.0}


def test_without_rows_nothing_is_measured() -> None:
    without = Evaluation(of_turns(), [], samples=3)
    without.measure(None, "before")
    assert (without.scores(), without.samples, without.gain, without.lines()) == ({}, [], None, [])


def test_the_gain_is_paired_by_row() -> None:
    before = Measured(Losses([3.0, 4.0, 5.0], [1, 1, 2]), [False, True, False])
    after = Measured(Losses([2.0, 4.0, 4.0], [1, 1, 2]), [True, True, False])
    gain = given(QUESTIONS[:3], before, after).gain
    assert gain == pytest.approx(
        {"loss": -0.5, "loss_stderr": (0.25 * 2 * 3 / 2) ** 0.5 / 4}
        | {"accuracy": 1 / 3, "accuracy_stderr": (2 / 3 / 2 / 3) ** 0.5}
    )


def test_a_line_for_each_row_has_what_pairs_it_and_equal_rows_are_counted() -> None:
    rows = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    before = Measured(Losses([3.0, 4.0, 5.0], [1, 1, 2]), [False, True, False])
    after = Measured(Losses([2.0, math.inf, 4.0], [1, 1, 2]), [True, True, False])
    evaluation = given(rows, before, after)
    evaluation.part = "validation"
    first, second, third = evaluation.lines()
    expected = {"digest": rows[0].digest, "copy": 0, "part": "validation", "tokens": 1}
    assert first == expected | {"before": 3.0, "right_before": 0, "after": 2.0, "right_after": 1}
    assert (second["copy"], third["copy"], third["digest"]) == (0, 1, first["digest"])
    del evaluation.measured["before"]
    assert evaluation.lines()[0] == expected | {"after": 2.0, "right_after": 1}


def test_a_model_to_which_all_tokens_are_alike_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_chat_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = scores_of(of_turns(), [Row("", "Open at nine."), Row("", "Closed.")], model)
    assert scores["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert scores["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)
    assert scores["tokens"] == len("Open at nine.Closed.") + 2  # and each end
    assert Losses([5000.0], [5]).perplexity == math.inf  # which no float holds


def test_a_question_is_right_where_its_choice_is_the_likeliest_of_all(model: PreTrainedModel) -> None:
    encoder, right = of_questions(), []
    for row in QUESTIONS:
        losses = row_losses(model, encoder.choices(row), encoder.pad).nll
        right.append(losses.index(min(losses)) == row.label)
    scores, share = scores_of(encoder, QUESTIONS, model), sum(right) / len(right)
    assert Evaluation(encoder, QUESTIONS).measure_once(model).right == right
    assert scores["accuracy"] == share
    assert scores["accuracy_stderr"] == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)


def test_equal_choices_are_equally_right(model: PreTrainedModel) -> None:
    row = dataclasses.replace(QUESTIONS[0], choices=("Same.", "Same."), label=1)
    assert Evaluation(of_questions(), [row]).measure_once(model).right == [True]


TEXTS = ["A short text.", "A text that is rather longer than the others are.", "Another text."]


@pytest.fixture
def _texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "passages", lambda text: TEXTS)


@pytest.mark.usefixtures("_texts")
@pytest.mark.parametrize("adds_bos", [True, False])
def test_every_token_of_a_text_is_scored(adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = lab.byte_tokenizer(adds_bos)
    model = LlamaForCausalLM.from_pretrained(lab.tiny_base(tmp_path)).eval()
    measured = Forgetting("mine.txt", 1000, tokenizer, model.config)
    measured.measure(model, "before")
    found = measured.losses["before"]
    assert found.tokens == [len(text) - (not adds_bos) for text in TEXTS]  # a byte is a token
    for text, nll in zip(TEXTS, found.nll, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        assert nll == pytest.approx(float(cross_entropy(logits[:-1], ids[1:], reduction="sum")), rel=1e-4)


@pytest.mark.usefixtures("_texts")
def test_texts_are_taken_until_there_are_enough_tokens_and_cut_at_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(tokens: int, positions: int = 100) -> list[int]:
        rows = Forgetting("mine.txt", tokens, lab.byte_tokenizer(False), GPT2Config(n_positions=positions)).rows
        return [len(row.input_ids) for row in rows]

    assert lengths(14) == [13, 49]  # the first has 13
    assert lengths(13) == [13]
    assert lengths(13, positions=12) == [12, 12]
    assert lengths(1000) == [13, 49, 13]
    monkeypatch.setattr(evaluation_module, "TEXT_TOKENS", 11)
    assert lengths(1000) == [11, 11, 11]


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


# what is written


def test_texts_come_back_in_order_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.build("llama").train(), lab.byte_tokenizer()

    def echo(input_ids: Tensor, **options: Any) -> Tensor:
        return torch.cat([input_ids, input_ids], dim=1)

    batches = list[int]()
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **options: batches.append(len(input_ids)) or echo(input_ids)
    )
    asked = ["word " * (i * 3 % 5) + "?" for i in range(7)]
    for size in (1, 3, 7):
        assert continue_prompts(model, tokenizer, [tokenizer(text)["input_ids"] for text in asked], 5, size) == asked
    assert model.training
    batches.clear()
    monkeypatch.setattr(evaluation_module, "BATCH_TOKENS", 180)
    continue_prompts(model, tokenizer, [[3] * length for length in (25, 25, *[4] * 40)], 5)
    assert batches == [8, 20, 14], "as many as the tokens of a batch hold, and eight at least"


def test_a_text_ends_at_the_tokenizers_end_and_at_those_of_the_model() -> None:
    model, tokenizer = tiny.build("llama"), lab.byte_tokenizer()
    for known, ends in ((None, [2]), (7, [2, 7]), ([2, 7], [2, 7])):
        model.generation_config.eos_token_id = known
        assert ends_of(model, tokenizer) == ends
    first = model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False, eos_token_id=[], pad_token_id=0)
    model.generation_config.eos_token_id = [int(first[0, -1])]
    (text,) = continue_prompts(model, tokenizer, [[3, 4]], new_tokens=5)
    assert text == tokenizer.decode(first[0, -1:]).strip()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"repetition_penalty": 3.0},
        {"encoder_repetition_penalty": 3.0},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[token] for token in range(3, 60)]},
        {"sequence_bias": [[[56], -50.0]]},
        {"suppress_tokens": [56]},
        {"begin_suppress_tokens": [56]},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 7},
        {"min_length": 12},
        {"min_new_tokens": 12},
        {"max_time": 0.0},
        {"stop_strings": ["a"]},
        {"guidance_scale": 5.0},
        {"exponential_decay_length_penalty": [1, 50.0]},
        {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}},
        {"prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_answers_are_greedy_whatever_the_models_generation_config_says(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.build("llama"), lab.byte_tokenizer()

    def answers() -> list[list[str]]:
        return [continue_prompts(model, tokenizer, [[3, 4], [5], [5, 27]], 12, size) for size in (1, 3)]

    plain = answers()
    model.generation_config.update(**settings)
    assert answers() == plain
    monkeypatch.setattr(evaluation_module, "greedily", lambda *_: nullcontext())
    try:
        other = answers()
    except (ValueError, TypeError, KeyError):  # the others can't be asked for without more arguments
        return
    assert other != plain, "the setting says nothing"


def test_a_prompt_that_leaves_no_positions_for_an_answer_loses_its_head(tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    tokenizer = lab.byte_tokenizer()
    bare = list(range(3, 43))
    texts = continue_prompts(model, tokenizer, [bare, bare[-24:], bare[:5]], new_tokens=8)
    assert texts[0] == texts[1]
    assert texts[2] == continue_prompts(model, tokenizer, [bare[:5]], new_tokens=8)[0]


def test_an_answer_takes_at_most_half_of_the_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    whole, shapes = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: shapes.append(whole(**options).shape) or whole(**options))
    monkeypatch.setattr("smoa_lab.scoring.evaluation.ends_of", lambda *_: [])
    continue_prompts(model, lab.byte_tokenizer(), [list(range(3, 43))], new_tokens=128)
    assert shapes == [(1, 32)]


class Writer(torch.nn.Module):
    """Writes the same after every prompt."""

    def __init__(self, encoder: Encoder, text: str) -> None:
        super().__init__()
        self.weight, self.config, self.asked = torch.nn.Parameter(torch.zeros(1)), GPT2Config(), list[int]()
        self.generation_config = GenerationConfig()
        self.ids = torch.tensor(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.read = list[list[int]]()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        self.asked.append(max_new_tokens)
        self.read += input_ids.tolist()
        return torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], dim=1)


def answered(rows: list[Row], text: str, metric: Any, samples: int = 0) -> tuple[Evaluation, Writer]:
    evaluation = Evaluation(of_turns(), rows, samples, metric=metric)
    writer = Writer(evaluation.encoder, text)
    vars(evaluation)["measure_once"] = lambda model: Measured(Losses([1.0] * len(rows), [1] * len(rows)))
    for stage in get_args(Stage):
        evaluation.measure(writer, stage)
    return evaluation, writer


def talk(asked: str, said: str) -> Row:
    return Row((), (Message("user", asked), Message("assistant", said)))


def test_a_metric_sees_the_answer_alone_and_not_the_prompt() -> None:
    rows = [talk("Is it six or seven?", "six"), talk("Say yes.", "yes")]
    evaluation, writer = answered(rows, " Say seven. ", "contains", samples=1)
    assert evaluation.scores()["after"]["contains"] == 0.0
    assert [line["answer_after"] for line in evaluation.lines()] == ["Say seven."] * 2
    assert [line["reference"] for line in evaluation.lines()] == ["six", "yes"]
    assert [sample["question"] for sample in evaluation.samples] == ["Is it six or seven?"]
    assert set(writer.asked) == {32}
    again, _ = answered([talk("Is it six?", "seven"), rows[1]], "seven", "contains")
    assert (again.scores()["after"]["contains"], again.gain and again.gain["contains"]) == (0.5, 0.0)


def test_an_answer_takes_half_of_the_positions_and_a_long_prompt_keeps_its_end() -> None:
    encoder = of_turns()
    writer = Writer(encoder, "yes")
    writer.config = GPT2Config(n_positions=16)
    assert continue_prompts(writer, encoder.tokenizer, [[*range(10, 30)]], 100) == ["yes"]
    assert (writer.asked, writer.read) == ([8], [[*range(22, 30)]])


def test_answers_have_room_for_all_references_but_the_longest() -> None:
    rows = [talk(f"Say {number}.", "word " * (200 if number else 400)) for number in range(150)]
    evaluation = Evaluation(of_turns(max_length=None), rows, metric="exact")
    usual = len(evaluation.encoder.tokenizer("word " * 200)["input_ids"]) + 1
    assert usual > 128
    assert evaluation.new_tokens == math.ceil(1.25 * usual)
    older = Evaluation(of_turns(max_length=None), rows, metric="exact", answer_tokens=128)
    assert older.new_tokens == 128, "as a study goes on that was planned before"
    room = Evaluation(of_turns(max_length=None), [talk("2 + 2?", "4")], metric="number", answer_tokens=256)
    assert room.new_tokens == 256, "an answer may show its way"


def test_a_users_metric_sees_the_answer_alone_and_the_rows_own_fields(tmp_path: Path) -> None:
    source = (
        "asked = []\ndef score(answer, row):\n    asked.append((answer, row))\n    return row['weight'] * len(answer)"
    )
    told = [{"weight": 1, "prompt": "Say yes.", "completion": "yes"}, {"weight": -2.5}]
    rows = [replace(talk("Say yes.", "yes"), own=json.dumps(own), where=f"row {i}") for i, own in enumerate(told)]
    with named(tmp_path / "own.py", source):
        evaluation, _ = answered(rows, " Say seven. ", "score")
        asked = own_metric().function.__globals__["asked"]
        assert asked == [(answer, own) for answer in ("yes", "Say seven.") for own in told]
        lines = evaluation.lines()
    assert evaluation.scores()["after"]["score"] == -7.5
    assert (evaluation.gain or {})["score"] == 0.0
    assert [(json.loads(line["own"]), line["where"]) for line in lines] == [(told[0], "row 0"), (told[1], "row 1")]


def test_a_users_metric_is_tried_on_the_references(tmp_path: Path) -> None:
    rows = [replace(talk("2 + 2?", "4"), own="{}", where="a.jsonl, row 1"), talk("Who?", "me")]
    with named(tmp_path / "own.py", "def score(answer, row): return row['n']"):
        with pytest.raises(DataError, match=r"^a\.jsonl, row 1: --metric .* fails on the answer '4': KeyError: 'n'"):
            Evaluation(of_turns(), rows, metric="score")
        with pytest.raises(DataError, match="score scores the answer to a prompt, and these rows have none"):
            Evaluation(of_turns(), [Row("", "A story.")], metric="score")


def test_a_row_whose_prompt_is_too_long_is_answered_too() -> None:
    rows = [talk("word " * 200, "yes"), talk("Yes?", "yes")]
    evaluation = Evaluation(of_turns(max_length=40), rows, 2, metric="exact")
    assert len(evaluation.prompts) == 2
    assert len(Evaluation(of_turns(max_length=40), rows, 2).prompts) == 1


@pytest.mark.parametrize(
    ("rows", "metric", "problem"),
    [
        ([Row("", "A story.")], "contains", "contains scores the answer to a prompt, and these rows have none"),
        ([talk("2 + 2?", "4")], "choice", "choice scores one of several choices, and these rows have none"),
        (
            [talk("2 + 2?", "4"), talk("And 3?", "five")],
            "number",
            "number: the completion of held-out row 2, 'five', has no number; fix the row, or take exact or contains",
        ),
    ],
)
def test_a_metric_refuses_rows_that_it_cant_score(rows: list[Row], metric: Any, problem: str) -> None:
    with pytest.raises(DataError, match=re.escape(problem)):
        Evaluation(of_turns(), rows, metric=metric)


def test_by_choice_nothing_is_written() -> None:
    evaluation = Evaluation(of_questions(), QUESTIONS, metric="choice")
    assert (evaluation.prompts, evaluation.metric) == ([], None)
