"""Writes what a model answered to held-out prompts before and after training, for people to read."""

from __future__ import annotations

NAMES = {"reference": "Reference", "before": "Before", "after": "After"}
FENCE = "`" * 5
"""Longer than any that an answer is likely to have."""


def samples_text(samples: list[dict[str, str]], level: int = 2) -> str:
    """Markdown: a heading of ``level`` for each prompt, and the answers below it as they were written."""
    return "".join(_sample(number, sample, level) for number, sample in enumerate(samples, start=1))


def _sample(number: int, sample: dict[str, str], level: int) -> str:
    answers = [f"{title}:\n\n{_block(sample[name])}" for name, title in NAMES.items() if name in sample]
    return f"{'#' * level} Prompt {number}\n\n{_block(sample['question'])}" + "".join(answers)


def _block(text: str) -> str:
    return f"{FENCE}text\n{text.strip() or '(nothing)'}\n{FENCE}\n\n"
