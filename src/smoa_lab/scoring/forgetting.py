"""Measures the loss on general text, whose rise is what a training forgot."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smoa_lab.data.prompts import PromptEncoder
from smoa_lab.data.records import Record
from smoa_lab.scoring.row_losses import Losses, row_losses

TEXT_TOKENS = 256
"""A longer text is cut at its end."""


def whole_text(record: Record) -> str:
    """A record as plain text without a template: context, prompt and answer, one below the other."""
    return "\n".join(filter(None, (record.context, record.prompt, record.answer)))


def text_losses(model: nn.Module, encoder: PromptEncoder, texts: Sequence[str]) -> Losses:
    """Of all tokens of plain texts, except that a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    encoded = [_ids(encoder, text) for text in texts]
    return row_losses(model, [{"input_ids": ids, "labels": ids} for ids in encoded], encoder.pad)


def _ids(encoder: PromptEncoder, text: str) -> list[int]:
    return [*encoder.head, *encoder.tokenizer(text, add_special_tokens=False)["input_ids"]][:TEXT_TOKENS]
