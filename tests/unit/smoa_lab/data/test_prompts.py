from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from smoa.errors import DataError
from smoa_lab.data.prompts import IGNORED, PromptEncoder, candidates, gold_response, instruction
from smoa_lab.data.records import Record, choice_record
from tests.support import lab

SUN = choice_record("arc_easy", "1", "What warms the Earth?", ["the Moon", "the Sun"], 1)
BOOLQ = choice_record("boolq", "2", "is water wet?", ["yes", "no"], 0, context="Water -- a liquid.")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return lab.byte_tokenizer()


def test_the_text_style_asks_the_bare_question_and_answers_in_words() -> None:
    assert instruction(SUN, "text") == "What warms the Earth?"
    assert gold_response(SUN, "text") == "the Sun"


def test_the_label_style_is_worded_as_the_reference() -> None:
    assert instruction(SUN, "label") == (
        "Please choose the correct answer to the question: What warms the Earth?\n\n"
        "Answer1: the Moon Answer2: the Sun\n\nAnswer format: answer1/answer2"
    )
    assert gold_response(SUN, "label") == "the correct answer is answer2"


def test_boolq_has_its_passage_in_text_style_and_not_in_the_references_label_style() -> None:
    assert instruction(BOOLQ, "text").startswith("Water -- a liquid.\n")
    assert instruction(BOOLQ, "label") == (
        "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false"
    )
    assert candidates(BOOLQ, "label") == ["the correct answer is true", "the correct answer is false"]


def test_an_example_begins_with_bos_ends_with_eos_and_is_trained_on_the_answer_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = PromptEncoder(tokenizer).example(SUN)
    assert example.row["input_ids"][0] == tokenizer.bos_token_id
    assert example.row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert example.row["input_ids"][-1] == tokenizer.eos_token_id
    trained = [token for token, label in zip(*example.row.values(), strict=True) if label != IGNORED]
    assert tokenizer.decode(trained) == "the Sun<eos>"
    assert tokenizer.decode(example.prompt).endswith("### Response:\n")


def test_a_tokenizer_that_adds_no_bos_gets_none() -> None:
    example = PromptEncoder(lab.byte_tokenizer(adds_bos=False)).example(SUN)
    assert 1 not in example.row["input_ids"]


def test_a_scored_choice_has_no_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(
        encoded.row["input_ids"][-1] != tokenizer.eos_token_id for encoded in PromptEncoder(tokenizer).choices(SUN)
    )


def test_truncation_keeps_bos_and_the_prompts_tail_and_counts_what_it_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = PromptEncoder(tokenizer).example(SUN)
    short = PromptEncoder(tokenizer, max_length=30).example(SUN)
    assert len(short.row["input_ids"]) == 30
    assert short.prompt[0] == tokenizer.bos_token_id
    assert short.prompt[1:] == whole.prompt[-(len(short.prompt) - 1) :]
    assert short.answer == whole.answer
    assert short.cut == len(whole.prompt) - len(short.prompt)


def test_an_answer_too_long_for_the_limit_loses_its_end_and_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = PromptEncoder(tokenizer, max_length=8).example(Record("own", "1", "Say it.", "a long long answer"))
    assert len(encoded.row["input_ids"]) == 8
    assert encoded.answer_cut > 0
    assert tokenizer.eos_token_id not in encoded.answer


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("length", [30, 31, 32, 40])
def test_something_always_precedes_the_answer(adds_bos: bool, length: int) -> None:
    encoder = PromptEncoder(lab.byte_tokenizer(adds_bos), max_length=32)
    record = Record("own", "1", "Say it.", "x" * length)
    for encoded in (encoder.example(record), encoder.gold(record)):
        assert encoded.prompt
        assert len(encoded.answer) == min(31, len(encoded.answer) + encoded.answer_cut)
        assert len(encoded.row["input_ids"]) == 32


def test_an_empty_prompt_needs_a_bos_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert PromptEncoder(tokenizer).encode_texts("", "yes", end=False).prompt == [tokenizer.bos_token_id]
    with pytest.raises(DataError, match="the prompt is empty and the tokenizer adds no BOS token"):
        PromptEncoder(lab.byte_tokenizer(adds_bos=False)).encode_texts("", "yes", end=False)


def test_the_chat_template_needs_a_tokenizer_that_has_one(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no chat template"):
        PromptEncoder(tokenizer, template="chat")


def test_the_chat_template_wraps_the_request_with_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[model]"
    )
    example = PromptEncoder(tokenizer, template="chat").example(SUN)
    assert tokenizer.decode(example.prompt) == "<bos>[user]What warms the Earth?[model]"


def test_a_tokenizer_without_an_end_token_cannot_be_trained_with(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    encoder = PromptEncoder(tokenizer)
    assert encoder.gold(SUN).answer
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encoder.example(SUN)
