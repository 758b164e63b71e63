from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from smoa_lab.data.rows import Row, choice_question, gold_response, question
from smoa_lab.scoring.generation import (
    Generated,
    _scores,
    continue_prompts,
    ends_of,
    extract_all,
    extract_choice,
    extract_number,
    token_f1,
)
from tests.support import lab, tiny_models

PIQA = choice_question("piqa", "1", "Cut it.", ["a saw", "glue"], 0)
BOOLQ = choice_question("boolq", "2", "is water wet?", ["yes", "no"], 0)
SUM = question("gsm8k", "3", "How many?", "16 - 4 = <<16-4=12>>12\n#### 12")


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
def test_the_label_is_the_first_match_of_the_tasks_own(record: Row, text: str, found: str | None) -> None:
    assert extract_choice(record, text, "label") == found


@pytest.mark.parametrize("label", [0, 8, 9, 10, 11])
def test_labels_of_two_digits_are_found_whole(label: int) -> None:
    record = choice_question("own", "1", "Which?", [f"choice {i}" for i in range(12)], label)
    assert extract_choice(record, gold_response(record, "label"), "label") == f"answer{label + 1}"
    assert extract_choice(record, "answer12 and not answer1", "label") == "answer12"


def test_in_the_text_style_the_text_must_be_a_choice() -> None:
    assert extract_choice(PIQA, " A  saw\n", "text") == "a saw"
    assert extract_choice(PIQA, "a saw, I think", "text") is None
    # Where nothing is extracted, the whole text is the answer.
    assert extract_all(SUM, " so it is \n", "text") == "so it is"
    assert extract_all(SUM, " \n", "text") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("it is 3.50", "3.5"),
        ("-7 apples", "-7"),
        ("12 then 12.0", "12"),
        ("none", None),
        ("it is 1234567.", "1234567"),
    ],
)
def test_the_number_is_the_last_one(text: str, number: str | None) -> None:
    assert extract_number(SUM, text, "text") == number
    assert extract_number(SUM, str(SUM.completion), "text") == "12"


def test_token_f1_counts_common_words() -> None:
    assert token_f1("The cat sat.", "the cat") == pytest.approx(0.8)
    assert token_f1("dog", "cat") == 0.0


def test_dialogue_is_scored_by_overlap_and_the_rest_is_not() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    records = [question("chat", str(i), "And then?", "we went home early that day") for i in range(2)]
    same = [
        Generated(record, str(record.completion), str(record.completion), str(record.completion)) for record in records
    ]
    scores = _scores(same, "dialogue")
    assert (scores.exact_match, scores.token_f1, scores.rouge_l) == (1.0, 1.0, 1.0)
    assert scores.bleu == pytest.approx(100.0)
    half = _scores([same[0], Generated(records[1], "", None, str(records[1].completion))], "dialogue")
    assert (half.exact_match, half.extraction_failures, half.token_f1, half.rouge_l) == (0.5, 1, 0.5, 0.5)
    assert _scores(same, "text").token_f1 is None


def test_texts_come_back_in_order_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_models.build("llama").train(), lab.byte_tokenizer()

    def echo(input_ids: Tensor, **options: Any) -> Tensor:
        return torch.cat([input_ids, input_ids], dim=1)

    monkeypatch.setattr(model, "generate", echo)
    asked = ["word " * (i * 3 % 5) + "?" for i in range(7)]
    for size in (1, 3, 7):
        assert continue_prompts(model, tokenizer, [tokenizer(text)["input_ids"] for text in asked], 5, size) == asked
    assert model.training


def test_a_text_ends_at_the_tokenizers_end_and_at_those_of_the_model() -> None:
    model, tokenizer = tiny_models.build("llama"), lab.byte_tokenizer()
    for known, ends in ((None, [2]), (7, [2, 7]), ([2, 7], [2, 7])):
        model.generation_config.eos_token_id = known
        assert ends_of(model, tokenizer) == ends
    first = model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False, eos_token_id=[], pad_token_id=0)
    model.generation_config.eos_token_id = [int(first[0, -1])]
    (text,) = continue_prompts(model, tokenizer, [[3, 4]], new_tokens=5)
    assert text == tokenizer.decode(first[0, -1:]).strip()


def test_a_prompt_that_leaves_no_positions_for_an_answer_loses_its_head(tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    tokenizer = lab.byte_tokenizer()
    bare = list(range(3, 43))
    for long, tail in ((bare, bare[-24:]), ([1, *bare], [1, *bare[-23:]])):  # 1 is BOS, which stays
        texts = continue_prompts(model, tokenizer, [long, tail, bare[:5]], new_tokens=8)
        assert texts[0] == texts[1]
        assert texts[2] == continue_prompts(model, tokenizer, [bare[:5]], new_tokens=8)[0]


def test_an_answer_takes_at_most_half_of_the_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = GPT2LMHeadModel.from_pretrained(lab.tiny_gpt2(tmp_path, positions=32))
    whole, shapes = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: shapes.append(whole(**options).shape) or whole(**options))
    continue_prompts(model, lab.byte_tokenizer(), [list(range(3, 43))], new_tokens=128, eos_token_id=[])
    assert shapes == [(1, 32)]
