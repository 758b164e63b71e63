from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from smoa_lab.data.prompts import Encoded
from smoa_lab.scoring.answer_loss import answer_nll, collate
from smoa_lab.scoring.likelihood import score_answers
from tests.support import tiny_models

# Prompts of equal and unequal lengths, shared and not, past the tiny Gemma's sliding window of 8; answers of 1 to 4.
SEQUENCES = [
    Encoded([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21]),
    Encoded([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [22]),
    Encoded([1, 4, 6, 7, 8, 9, 10, 11, 12, 13], [22, 23, 24, 25]),
    Encoded([1, 5, 6], [30, 31, 32]),
    Encoded([1, 5, 6], [33]),
    Encoded([1, 5, 7], [33]),
    Encoded([1], [33, 2]),
]


def one_by_one(model: PreTrainedModel, sequence: Encoded) -> float:
    batch = collate([sequence.row], pad=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(answer_nll(model(**batch).logits, labels).sum())


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sharing_prompts_gives_what_scoring_one_by_one_gives(family: str, batch_tokens: int) -> None:
    model = tiny_models.build(family).eval()
    found = score_answers(model, SEQUENCES, pad=0, batch_tokens=batch_tokens)
    assert [len(score.nll) for score in found] == [len(sequence.answer) for sequence in SEQUENCES]
    assert [score.loss for score in found] == pytest.approx([one_by_one(model, s) for s in SEQUENCES], rel=1e-4)


def test_padding_takes_no_positions_that_the_model_does_not_have() -> None:
    model = tiny_models.build("gpt2").eval()  # of 64 positions
    prompt = [*range(3, 35), *range(3, 33)]
    sequences = [Encoded(prompt, [20, 21]), Encoded(prompt, [22]), Encoded(prompt[:3], [23, 24, 25, 26])]
    found = score_answers(model, sequences, pad=0, batch_tokens=1000)
    assert [score.loss for score in found] == pytest.approx([one_by_one(model, s) for s in sequences], rel=1e-4)


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny_models.build("llama").train()
    score_answers(model, SEQUENCES, pad=0, batch_tokens=100)
    assert model.training


def test_greedy_means_that_decoding_gives_the_answer() -> None:
    model = tiny_models.build("llama").eval()
    prompt = [1, 5, 6, 7]
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    answer = written[0, 4:].tolist()
    other = [*answer[:2], (answer[2] + 1) % tiny_models.VOCAB_SIZE]
    sequences = [Encoded(prompt, answer), Encoded(prompt, other)]
    assert [score.greedy for score in score_answers(model, sequences, pad=0, batch_tokens=100)] == [True, False]


def test_a_model_that_keeps_no_keys_and_values_is_scored_all_the_same() -> None:
    model = tiny_models.build("llama").eval()
    expected = [one_by_one(model, sequence) for sequence in SEQUENCES[:-1]]

    def forget(module: PreTrainedModel, inputs: tuple[object, ...], output: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=output.logits)

    model.register_forward_hook(forget)
    found = score_answers(model, SEQUENCES[:-1], pad=0, batch_tokens=1000)
    assert [score.loss for score in found] == pytest.approx(expected, rel=1e-4)


def test_of_no_answers_there_are_no_scores() -> None:
    assert score_answers(tiny_models.build("llama"), [], pad=0, batch_tokens=100) == []
