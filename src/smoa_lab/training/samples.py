"""What the model writes for a few held-out questions, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smoa_lab.data.prompts import PromptEncoder, gold_response, instruction
from smoa_lab.data.records import Record
from smoa_lab.scoring.generation import generate

NEW_TOKENS = 24


def written_answers(model: Any, encoder: PromptEncoder, records: Sequence[Record]) -> list[str]:
    """What the model writes for each record, greedily, on one line."""
    texts = generate(model, encoder, records, NEW_TOKENS, batch_size=8)
    return [" ".join(text.split()) for text in texts]


def samples(
    encoder: PromptEncoder, records: Sequence[Record], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """Question, reference answer, and what was written before, if that is known, and after: as ``metrics.json`` has
    them."""
    found = []
    for number, record in enumerate(records):
        question, reference = instruction(record, encoder.style), gold_response(record, encoder.style)
        sample = {"question": question, "reference": reference}
        if before:
            sample["before"] = before[number]
        found.append({**sample, "after": after[number]})
    return found
