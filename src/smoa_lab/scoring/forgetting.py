"""Measures the loss on general text, whose rise is what a training forgot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from smoa_lab.data.prompts import pad_token
from smoa_lab.data.records import Record
from smoa_lab.scoring.row_losses import Losses, row_losses

TEXT_TOKENS = 256
"""A longer text is cut at its end."""


def whole_text(record: Record) -> str:
    """A record as plain text without a template: context, prompt and answer, one below the other."""
    return "\n".join(filter(None, (record.context, record.prompt, record.answer)))


def text_losses(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Losses:
    """The losses of plain texts, over all their tokens; a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    rows = [{"input_ids": ids, "labels": ids} for ids in (_ids(tokenizer, text) for text in texts)]
    return row_losses(model, rows, pad_token(tokenizer))


def at_least(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int) -> list[str]:
    """The first texts that together have so many tokens; all of them if they have fewer."""
    chosen: list[str] = []
    for text in texts:
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= len(_ids(tokenizer, text))
    return chosen


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])[:TEXT_TOKENS]
