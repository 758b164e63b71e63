"""Writes what a model answered to held-out prompts before and after training, for people to read."""

from __future__ import annotations

import re

NAMES = {"reference": "Reference", "before": "Before", "after": "After"}


def samples_text(samples: list[dict[str, str]], level: int = 2) -> str:
    """Markdown: a heading of ``level`` for each prompt, and the answers below it as they were written."""
    return "".join(_sample(number, sample, level) for number, sample in enumerate(samples, start=1))


def _sample(number: int, sample: dict[str, str], level: int) -> str:
    answers = [f"{title}:\n\n{_block(sample[name])}" for name, title in NAMES.items() if name in sample]
    return f"{'#' * level} Prompt {number}\n\n{_block(sample['question'])}" + "".join(answers)


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
    return f"{fence}text\n{text.strip() or '(nothing)'}\n{fence}\n\n"
