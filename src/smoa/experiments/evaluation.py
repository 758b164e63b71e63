"""Held-out scores by likelihood: the loss of the gold answers, and how often the gold choice is the likeliest."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from smoa.experiments.data.records import Record
from smoa.experiments.likelihood import sequence_losses
from smoa.experiments.prompts import PromptEncoder


@dataclass(frozen=True)
class Scores:
    """``gold_loss``: mean negative log-likelihood of a gold answer's token, end token not counted, in nats.
    ``accuracy`` takes the choice of the highest log-likelihood, ``accuracy_norm`` that of the highest per byte of its
    text (lm-eval's acc and acc_norm); both with their standard errors. ``majority``: always the commonest label.
    None where no question has choices."""

    questions: int
    gold_loss: float
    gold_loss_stderr: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    accuracy_norm: float | None = None
    accuracy_norm_stderr: float | None = None
    majority: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate_records(
    model: nn.Module, encoder: PromptEncoder, records: Sequence[Record], batch_tokens: int = 4096
) -> dict[str, Scores]:
    """Scores per task, and over all under ``all``. Dropout is off and no gradient kept; the mode is put back."""
    sequences = [sequence for record in records for sequence in (encoder.choices(record) or [encoder.gold(record)])]
    losses = iter(sequence_losses(model, sequences, encoder.pad, batch_tokens))
    outcomes = [_outcome(record, [next(losses) for _ in record.choices or (0,)]) for record in records]
    names = list(dict.fromkeys(record.task for record in records))
    per_task = {name: _scores([o for o in outcomes if o.record.task == name]) for name in names}
    return {**per_task, "all": _scores(outcomes)}


@dataclass(frozen=True)
class _Outcome:
    record: Record
    gold: tuple[float, int]
    right: bool | None
    right_norm: bool | None


def _outcome(record: Record, losses: list[tuple[float, int]]) -> _Outcome:
    if record.label is None:
        return _Outcome(record, losses[0], None, None)
    sums = [loss for loss, _ in losses]
    per_byte = [loss / len(text.encode()) for loss, text in zip(sums, record.choices, strict=True)]
    return _Outcome(
        record,
        losses[record.label],
        right=sums.index(min(sums)) == record.label,
        right_norm=per_byte.index(min(per_byte)) == record.label,
    )


def _scores(outcomes: list[_Outcome]) -> Scores:
    tokens = sum(count for _, count in (outcome.gold for outcome in outcomes))
    gold_loss = sum(loss for loss, _ in (outcome.gold for outcome in outcomes)) / tokens
    # The error of a ratio of sums, questions drawn at random.
    deviations = [loss - gold_loss * count for loss, count in (outcome.gold for outcome in outcomes)]
    stderr = math.sqrt(sum(deviation**2 for deviation in deviations)) / tokens
    answered = [outcome for outcome in outcomes if outcome.right is not None]
    if not answered:
        return Scores(len(outcomes), gold_loss, stderr)
    accuracy, accuracy_stderr = _share([bool(outcome.right) for outcome in answered])
    norm, norm_stderr = _share([bool(outcome.right_norm) for outcome in answered])
    majority = _majority([outcome.record for outcome in answered])
    return Scores(len(outcomes), gold_loss, stderr, accuracy, accuracy_stderr, norm, norm_stderr, majority)


def _majority(records: list[Record]) -> float:
    """How often each task's commonest label is right."""
    counts: dict[str, Counter[int | None]] = defaultdict(Counter)
    for record in records:
        counts[record.task][record.label] += 1
    return sum(max(labels.values()) for labels in counts.values()) / len(records)


def _share(hits: list[bool]) -> tuple[float, float]:
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / max(1, len(hits) - 1))
