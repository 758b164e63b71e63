"""Measures the loss on tokenized rows, and how it changed, paired by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from smoa_lab.scoring.answer_loss import answer_nll, answer_positions, collate, logits_at
from smoa_lab.scoring.mode import scoring

BATCH_LOGITS = 2**28
"""Logits of a batch if every padded token has them: 1 GiB in float32, 1,024 tokens with Gemma's vocabulary."""


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
        """The standard error of :attr:`mean`, rows drawn at random."""
        return _ratio_error(self.nll, self.tokens)

    def change_from(self, before: Losses) -> Change:
        """How much :attr:`mean` rose from ``before``, of the same rows, with its standard error."""
        rises = [late - early for early, late in zip(before.nll, self.nll, strict=True)]
        return Change(sum(rises) / sum(self.tokens), _ratio_error(rises, self.tokens))


@dataclass(frozen=True)
class Change:
    """The rise of a loss in nats per token with its standard error."""

    mean: float
    stderr: float


def row_losses(model: nn.Module, rows: Sequence[dict[str, list[int]]], pad: int) -> Losses:
    """The losses of rows with ``input_ids`` and ``labels``. ``pad`` is the token that fills a batch.

    Dropout is off, no gradient is kept, and the model's mode is restored.
    """
    found: dict[int, tuple[float, int]] = {}
    device, vocabulary = next(model.parameters()).device, cast(Any, model).config.get_text_config().vocab_size
    with scoring(model):
        for numbers in batches([len(row["input_ids"]) for row in rows], BATCH_LOGITS // vocabulary):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[one] for one in numbers], pad).items()}
            found.update(zip(numbers, _losses(model, **batch), strict=True))
    return Losses([found[one][0] for one in range(len(rows))], [found[one][1] for one in range(len(rows))])


def _losses(model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> list[tuple[float, int]]:
    positions = answer_positions(labels)
    with logits_at(model, positions):
        nll = answer_nll(model(**inputs, use_cache=False).logits, labels)
    counts = positions.sum(dim=1).tolist()
    return [(float(part.sum()), count) for part, count in zip(nll.split(counts), counts, strict=True)]


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of the rows, the longest first, in batches of at most ``most`` padded tokens, or of one row."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _ratio_error(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """The standard error of a ratio of sums."""
    mean = sum(nll) / sum(tokens)
    return math.sqrt(sum((one - mean * size) ** 2 for one, size in zip(nll, tokens, strict=True))) / sum(tokens)
