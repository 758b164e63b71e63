from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from smoa.experiments.answer_loss import answer_nll, collate
from smoa.experiments.likelihood import sequence_losses
from smoa.experiments.prompts import Encoded
from tests import tiny_models

# Prompts of equal and unequal lengths, shared and not, past the tiny Gemma's sliding window of 8; answers of 1 to 4.
SEQUENCES = [
    Encoded([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], ends=False),
    Encoded([1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [22], ends=False),
    Encoded([1, 4, 6, 7, 8, 9, 10, 11, 12, 13], [22, 23, 24, 25], ends=False),
    Encoded([1, 5, 6], [30, 31, 32], ends=False),
    Encoded([1, 5, 6], [33], ends=False),
    Encoded([1, 5, 7], [33], ends=False),
    Encoded([1], [33, 2], ends=False),
]


def one_by_one(model: PreTrainedModel, sequence: Encoded) -> float:
    batch = collate([sequence], pad=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(answer_nll(model(**batch).logits, labels).sum())


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sharing_prompts_gives_what_scoring_one_by_one_gives(family: str, batch_tokens: int) -> None:
    model = tiny_models.build(family).eval()
    found = sequence_losses(model, SEQUENCES, pad=0, batch_tokens=batch_tokens)
    assert [count for _, count in found] == [len(sequence.answer) for sequence in SEQUENCES]
    assert [loss for loss, _ in found] == pytest.approx([one_by_one(model, s) for s in SEQUENCES], rel=1e-4)


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny_models.build("llama").train()
    sequence_losses(model, SEQUENCES, pad=0, batch_tokens=100)
    assert model.training
