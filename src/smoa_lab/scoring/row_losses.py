"""Measures the loss on tokenized rows, and how it changed, paired by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smoa_lab.scoring.answer_loss import answer_nll, answer_positions, collate, logits_at
from smoa_lab.scoring.mode import scoring

BATCH_TOKENS = 4096
"""Padded tokens in a batch."""


@dataclass(frozen=True)
class Losses:
    """The negative log-likelihood of each row in nats, and the tokens that it is over."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def stderr(self) -> float:
        """Of :attr:`mean`, rows drawn at random."""
        return _ratio_error(self.nll, self.tokens)

    def change_from(self, before: Losses) -> tuple[float, float]:
        """How much :attr:`mean` rose from ``before``, of the same rows, with its standard error."""
        rises = [late - early for early, late in zip(before.nll, self.nll, strict=True)]
        return sum(rises) / sum(self.tokens), _ratio_error(rises, self.tokens)


def row_losses(model: nn.Module, rows: Sequence[dict[str, list[int]]], pad: int) -> Losses:
    """Of rows with ``input_ids`` and ``labels``. Dropout is off, no gradient is kept, the model's mode is restored."""
    found: dict[int, tuple[float, int]] = {}
    device = next(model.parameters()).device
    with scoring(model):
        for numbers in _batches([len(row["input_ids"]) for row in rows]):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[one] for one in numbers], pad).items()}
            found.update(zip(numbers, _losses(model, **batch), strict=True))
    return Losses([found[one][0] for one in range(len(rows))], [found[one][1] for one in range(len(rows))])


def _losses(model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> list[tuple[float, int]]:
    positions = answer_positions(labels)
    with logits_at(model, positions):
        nll = answer_nll(model(**inputs, use_cache=False).logits, labels)
    counts = positions.sum(dim=1).tolist()
    return [(float(part.sum()), count) for part, count in zip(nll.split(counts), counts, strict=True)]


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Rows of like length together, the longest first."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _ratio_error(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """The standard error of a ratio of sums."""
    mean = sum(nll) / sum(tokens)
    return math.sqrt(sum((one - mean * size) ** 2 for one, size in zip(nll, tokens, strict=True))) / sum(tokens)
