"""Measures forgetting: the loss on texts or answers before and after a training, paired, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from smoa_lab.data.prompts import Encoded, PromptEncoder
from smoa_lab.data.records import Record
from smoa_lab.scoring.likelihood import score_answers

TEXT_TOKENS = 256
"""A longer text is cut at its end."""
BATCH_TOKENS = 512
"""Padded tokens in a batch. Every one has logits, of 262,144 entries with Gemma's vocabulary."""


@dataclass(frozen=True)
class Losses:
    """The negative log-likelihood of each text or answer in nats, and its tokens."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nll) / sum(self.tokens)


@dataclass(frozen=True)
class Forgot:
    """The rise of the loss in nats per token with its standard error, texts drawn at random."""

    mean: float
    stderr: float


def whole_text(record: Record) -> str:
    """A record as plain text without a template: context, prompt and answer, one below the other."""
    return "\n".join(filter(None, (record.context, record.prompt, record.answer)))


def text_losses(model: nn.Module, encoder: PromptEncoder, texts: Sequence[str]) -> Losses:
    """Of all tokens of plain texts, except that a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    encoded = [_encoded(encoder, text) for text in texts]
    scores = score_answers(model, encoded, encoder.pad, BATCH_TOKENS)
    return Losses([score.loss for score in scores], [len(score.nll) for score in scores])


def forgot(before: Losses, after: Losses) -> Forgot:
    """Both of the same texts, in the same order."""
    rises = [late - early for early, late in zip(before.nll, after.nll, strict=True)]
    tokens = sum(before.tokens)
    mean = sum(rises) / tokens
    # The standard error of a ratio of sums.
    deviations = [rise - mean * size for rise, size in zip(rises, before.tokens, strict=True)]
    return Forgot(mean, math.sqrt(sum(one**2 for one in deviations)) / tokens)


def _encoded(encoder: PromptEncoder, text: str) -> Encoded:
    ids = [*encoder.head, *encoder.tokenizer(text, add_special_tokens=False)["input_ids"]][:TEXT_TOKENS]
    return Encoded(ids[:1], ids[1:])
