"""Scores held-out questions by likelihood: the loss of the gold answers, and how often the gold answer is likeliest."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from smoa_lab.data.prompts import Encoded, PromptEncoder, candidates
from smoa_lab.data.records import Record
from smoa_lab.scoring.likelihood import AnswerScore, score_answers
from smoa_lab.scoring.row_losses import Losses


@dataclass(frozen=True)
class Scores:
    """``gold_loss``: mean negative log-likelihood of a gold answer's token, end token not counted, in nats.

    With choices, ``accuracy`` takes the choice of the highest log-likelihood, ``accuracy_norm`` that of the highest
    per character of its text (lm-eval's acc and acc_norm), ``majority`` always the commonest label. Without,
    ``accuracy`` is the exact match of greedy decoding: answer and end token are the likeliest at every place.
    """

    questions: int
    gold_loss: float
    gold_loss_stderr: float
    accuracy: float
    accuracy_stderr: float
    accuracy_norm: float | None = None
    accuracy_norm_stderr: float | None = None
    majority: float | None = None


def answer_outcomes(
    model: nn.Module, encoder: PromptEncoder, records: Sequence[Record], batch_tokens: int = 4096
) -> list[Outcome]:
    """What the model makes of each question, in order."""
    encoded = [encoder.choices(record) if record.choices else [encoder.example(record)] for record in records]
    flat = iter(score_answers(model, [one for some in encoded for one in some], encoder.pad, batch_tokens))
    return [
        _of_choices(record, [next(flat) for _ in some], [len(text) for text in candidates(record, encoder.style)])
        if record.choices
        else _of_free_answer(record, next(flat), some[0])
        for record, some in zip(records, encoded, strict=True)
    ]


def score_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Scores]:
    """Scores per task, and over all under ``all``."""
    names = dict.fromkeys(o.record.task for o in outcomes)
    per_task = {name: _scores([o for o in outcomes if o.record.task == name]) for name in names}
    return {**per_task, "all": _scores(outcomes)}


@dataclass(frozen=True)
class Outcome:
    """One question: its gold answer's negative log-likelihood in nats over its tokens, and whether the answer is right,
    by likelihood and by likelihood per character."""

    record: Record
    gold_nll: float
    gold_tokens: int
    right: bool
    right_norm: bool


def _of_free_answer(record: Record, score: AnswerScore, encoded: Encoded) -> Outcome:
    """Its loss is without that of the end token, which a cut answer has lost: then it can't be right either."""
    nll = score.nll if encoded.answer_cut else score.nll[:-1]
    right = score.greedy and not encoded.answer_cut
    return Outcome(record, sum(nll), len(nll), right, right)


def _of_choices(record: Record, scores: list[AnswerScore], lengths: list[int]) -> Outcome:
    assert record.label is not None
    losses = [score.loss for score in scores]
    normed = [loss / length for loss, length in zip(losses, lengths, strict=True)]
    return Outcome(
        record,
        gold_nll=losses[record.label],
        gold_tokens=len(scores[record.label].nll),
        right=losses.index(min(losses)) == record.label,
        right_norm=normed.index(min(normed)) == record.label,
    )


def _scores(outcomes: Sequence[Outcome]) -> Scores:
    gold = Losses([outcome.gold_nll for outcome in outcomes], [outcome.gold_tokens for outcome in outcomes])
    share = proportion([outcome.right for outcome in outcomes])
    if not all(outcome.record.choices for outcome in outcomes):
        return Scores(len(outcomes), gold.mean, gold.stderr, *share)
    norm = proportion([outcome.right_norm for outcome in outcomes])
    majority = _majority([outcome.record for outcome in outcomes])
    return Scores(len(outcomes), gold.mean, gold.stderr, *share, *norm, majority)


def _majority(records: list[Record]) -> float:
    """How often each task's commonest label is right."""
    counts: dict[str, Counter[int | None]] = defaultdict(Counter)
    for record in records:
        counts[record.task][record.label] += 1
    return sum(max(labels.values()) for labels in counts.values()) / len(records)


def proportion(hits: Sequence[bool]) -> tuple[float, float]:
    """The share of hits and its standard error."""
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / max(1, len(hits) - 1))
