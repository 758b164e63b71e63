"""Measures the loss on general text, whose rise is what a training forgot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from smoa_lab.basics.positions import positions_of
from smoa_lab.data.encoding import Tokens, pad_token
from smoa_lab.data.general_text import describe, passages
from smoa_lab.data.rows import Row
from smoa_lab.scoring.losses import Losses, row_losses

TEXT_TOKENS = 256
"""A longer text is cut at its end, and a shorter one where the model takes less."""


class Forgetting:
    """Measures a model of the config ``base`` on ``text`` before and after training, on at least so many ``tokens``.

    The text is read at once: a mistake in the run's config shows before any work.
    """

    def __init__(self, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig) -> None:
        self.source, self.tokenizer = text, tokenizer
        self.texts = at_least(tokenizer, passages(text), tokens, text_length(base)) if tokens else []
        self.losses: dict[str, Losses] = {}

    def measure(self, model: Any, stage: str) -> None:
        """Measure the loss ``before`` or ``after``."""
        if self.texts:
            self.losses[stage] = text_losses(model, self.tokenizer, self.texts)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` has of it: the losses in nats per token, and their change with its standard error,
        paired by text; None if it was not measured."""
        if len(self.losses) < 2:
            return None
        before, after = self.losses["before"], self.losses["after"]
        change = after.change_from(before)
        return {
            "text": describe(self.source),
            "passages": len(self.texts),
            "tokens": sum(before.tokens),
            "before": before.mean,
            "after": after.mean,
            "change": change.mean,
            "stderr": change.stderr,
        }


def text_length(config: PretrainedConfig) -> int:
    """The most tokens of a text that this model is given."""
    return min(TEXT_TOKENS, positions_of(config) or TEXT_TOKENS)


def whole_text(row: Row) -> str:
    """A question as plain text without a template: context, prompt and answer, one below the other."""
    return "\n".join(str(part) for part in (row.context, row.prompt, row.completion) if part)


def text_losses(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Losses:
    """The losses of plain texts, over all their tokens; a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    length = text_length(model.config)
    rows = [Tokens(ids, ids) for ids in (_ids(tokenizer, text, length) for text in texts)]
    return row_losses(model, rows, pad_token(tokenizer))


def at_least(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, length: int) -> list[str]:
    """The first texts that, cut at ``length``, together have so many tokens; all of them if they have fewer."""
    chosen: list[str] = []
    for text in texts:
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= len(_ids(tokenizer, text, length))
    return chosen


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[int]:
    return list(tokenizer(text)["input_ids"])[:length]
