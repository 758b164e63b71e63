"""A run in Markdown: the README.md of its adapter, and what the model answered before and after training."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig

from smoa.files.card import NamedBase, adapter_card
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.pages.tables import score_table, time_text
from smoa_lab.pages.templates import render

ANSWERS = {"reference": "Reference", "before": "Before", "after": "After"}


def run_card(title: str, config: PeftConfig, base: NamedBase, metrics: dict[str, Any]) -> str:
    """The card of a run's adapter: base, results before and after, data, settings, versions, how to load it.

    ``config`` is the adapter's as saved, ``metrics`` the run's.
    """
    evaluation = metrics["evaluation"]
    sections = render(
        "run_card.md.jinja",
        metrics=metrics,
        stages=list(evaluation),
        results=score_table(evaluation),
        time=time_text(metrics["training"]),
        samples=samples_text(metrics["samples"][:2], level=3),
        config=to_yaml({key: value for key, value in metrics["config"].items() if key != "adapter"}),
    )
    return adapter_card(title, config, {}, base, sections)


def samples_text(samples: list[dict[str, str]], level: int = 2) -> str:
    """What was answered to held-out prompts: a heading of ``level`` for each, and below it the answers as written."""
    texts = []
    for number, sample in enumerate(samples, start=1):
        answers = [f"{title}:\n\n{_block(sample[name])}" for name, title in ANSWERS.items() if name in sample]
        texts.append(f"{'#' * level} Prompt {number}\n\n{_block(sample['question'])}" + "".join(answers))
    return "".join(texts)


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
    return f"{fence}text\n{text.strip() or '(nothing)'}\n{fence}\n\n"
