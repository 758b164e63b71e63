from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from smoa_lab.data.prompts import IGNORED
from smoa_lab.scoring import row_losses as module
from smoa_lab.scoring.row_losses import Losses, batches, row_losses
from tests.support import tiny_models

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
    {"input_ids": list(range(1, 21)), "labels": [IGNORED] * 10 + list(range(11, 21))},
    {"input_ids": [9, 10, 11, 12], "labels": [9, 10, 11, 12]},  # the first is never predicted
    {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [IGNORED, 4, 5, IGNORED, IGNORED, 8]},
    {"input_ids": [30, 31], "labels": [IGNORED, IGNORED]},
]


@torch.no_grad()
def naive(model: PreTrainedModel) -> list[tuple[float, int]]:
    """Token by token, one row at a time."""
    found = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        places = [i for i in range(1, len(row["labels"])) if row["labels"][i] != IGNORED]
        nll = [-float(F.log_softmax(logits[i - 1], dim=-1)[row["labels"][i]]) for i in places]
        found.append((sum(nll), len(places)))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_losses_are_those_of_a_loop_over_rows_and_tokens(
    family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build(family).eval()
    monkeypatch.setattr(module, "BATCH_LOGITS", batch_tokens * model.config.get_text_config().vocab_size)
    found, expected = row_losses(model, ROWS, pad=0), naive(model)
    assert found.tokens == [count for _, count in expected] == [2, 10, 3, 3, 0]
    assert found.nll == pytest.approx([nll for nll, _ in expected], rel=1e-4, abs=1e-6)


def test_rows_of_like_length_share_a_batch_within_the_limit() -> None:
    assert list(batches([3, 20, 4, 6, 2], 12)) == [[1], [3, 2], [0, 4]]
    assert list(batches([], 12)) == []


def test_the_models_mode_is_restored_and_no_gradient_is_kept() -> None:
    model = tiny_models.build("llama").train()
    row_losses(model, ROWS, pad=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mean_is_over_tokens_and_not_over_rows() -> None:
    losses = Losses([2.0, 30.0], [1, 10])
    assert losses.mean == pytest.approx(32 / 11)
    residuals = [2 - 32 / 11, 30 - 320 / 11]
    assert losses.stderr == pytest.approx(math.hypot(*residuals) / 11)


def test_a_change_is_paired_by_row() -> None:
    before = Losses([5.0, 40.0, 9.0], [1, 10, 3])
    after = Losses([4.0, 30.0, 6.0], [1, 10, 3])
    change = after.change_from(before)
    assert change.mean == pytest.approx(after.mean - before.mean) == pytest.approx(-1)
    assert change.stderr == pytest.approx(0, abs=1e-12)
    assert change.stderr < after.stderr


def test_no_rows_give_no_losses() -> None:
    assert row_losses(tiny_models.build("llama"), [], pad=0) == Losses([], [])
