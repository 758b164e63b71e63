from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from smoa_lab.scoring import row_losses as module
from smoa_lab.scoring.row_losses import Losses, row_losses
from tests.support import tiny_models

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [9, 10]},
    {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, 4, -100, -100, 7, -100]},
]


@pytest.mark.parametrize("logits", [2**28, 1])
def test_the_losses_of_rows_are_those_of_a_loop(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_LOGITS", logits)  # with 1 each row is a batch
    model = tiny_models.build("llama").train()
    found = row_losses(model, ROWS, pad=0)
    assert model.training
    model.eval()
    for row, nll, tokens in zip(ROWS, found.nll, found.tokens, strict=True):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits_of_row = model(torch.tensor(row["input_ids"])[None]).logits[0, :-1]
        assert nll == pytest.approx(float(cross_entropy(logits_of_row, labels, reduction="sum")), rel=1e-4)
        assert tokens == int((labels != -100).sum())


def test_a_change_is_the_rise_of_the_loss_per_token() -> None:
    before = Losses([2.0, 6.0], [1, 3])
    assert before.mean == 2.0
    found = Losses([3.0, 7.0], [1, 3]).change_from(before)
    assert found.mean == 0.5
    assert found.stderr == pytest.approx((0.5**2 + 0.5**2) ** 0.5 / 4)


def test_the_error_of_a_change_is_paired() -> None:
    """Texts differ in their loss, not in its rise."""
    before = Losses([1.0, 50.0, 7.0], [10, 10, 10])
    found = Losses([nll + 2 for nll in before.nll], before.tokens).change_from(before)
    assert (found.mean, found.stderr) == (pytest.approx(0.2), pytest.approx(0.0))
