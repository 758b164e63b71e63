"""Measures the loss on general text, whose rise is what a training forgot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from smoa_lab.basics.positions import positions_of
from smoa_lab.data.prompts import pad_token
from smoa_lab.data.records import Record
from smoa_lab.scoring.row_losses import Losses, row_losses

TEXT_TOKENS = 256
"""A longer text is cut at its end, and a shorter one where the model takes less."""


def text_length(config: PretrainedConfig) -> int:
    """The most tokens of a text that this model is given."""
    return min(TEXT_TOKENS, positions_of(config) or TEXT_TOKENS)


def whole_text(record: Record) -> str:
    """A record as plain text without a template: context, prompt and answer, one below the other."""
    return "\n".join(filter(None, (record.context, record.prompt, record.answer)))


def text_losses(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Losses:
    """The losses of plain texts, over all their tokens; a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    length = text_length(model.config)
    rows = [{"input_ids": ids, "labels": ids} for ids in (_ids(tokenizer, text, length) for text in texts)]
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
