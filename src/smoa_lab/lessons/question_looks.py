"""What held-out questions show before and after training: scores, and what the model writes for some of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from smoa_lab.config.run_config import TaskSection
from smoa_lab.data.prompts import PromptEncoder, gold_response, instruction
from smoa_lab.data.records import Record
from smoa_lab.lessons.lesson import Looks, Stage
from smoa_lab.scoring.generation import generate
from smoa_lab.scoring.held_out import Outcome, answer_outcomes, score_outcomes

logger = logging.getLogger(__name__)

NEW_TOKENS = 24


class QuestionLooks(Looks):
    """Looks at a model before and after training. The model writes answers to the first ``task.samples`` records,
    unless it is spread over several processes (``alone`` is false)."""

    def __init__(self, encoder: PromptEncoder, records: Sequence[Record], task: TaskSection, alone: bool) -> None:
        super().__init__()
        self.encoder, self.records, self.task = encoder, records, task
        self.outcomes: dict[str, list[Outcome]] = {}
        self.shown = records[: task.samples] if alone else []

    def look(self, model: Any, stage: Stage) -> None:
        if not self.records or (stage == "before" and not self.task.baseline):
            return
        logger.info("Scoring %d held-out questions %s training", len(self.records), stage)
        outcomes = answer_outcomes(model, self.encoder, self.records, self.task.eval_batch_tokens)
        self.outcomes[stage] = outcomes
        self.evaluation[stage] = {name: asdict(score) for name, score in score_outcomes(outcomes).items()}
        self.written[stage] = written_answers(model, self.encoder, self.shown)

    @property
    def gain(self) -> dict[str, float] | None:
        """The rise in accuracy with its standard error, paired by question."""
        if len(self.outcomes) < 2:
            return None
        pairs = zip(self.outcomes["before"], self.outcomes["after"], strict=True)
        rises = [after.right - before.right for before, after in pairs]
        mean = sum(rises) / len(rises)
        squares = sum((rise - mean) ** 2 for rise in rises)
        return {"accuracy": mean, "accuracy_stderr": math.sqrt(squares / max(1, len(rises) - 1) / len(rises))}

    @property
    def asked(self) -> list[tuple[str, str]]:
        style = self.encoder.style
        return [(instruction(record, style), gold_response(record, style)) for record in self.shown]


def written_answers(model: Any, encoder: PromptEncoder, records: Sequence[Record]) -> list[str]:
    """What the model writes for each record, greedily, on one line."""
    texts = generate(model, encoder, records, NEW_TOKENS, batch_size=8)
    return [" ".join(text.split()) for text in texts]
