"""What a run forgets of general text: the loss before and after, measured by the same tokens."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from smoa_lab.config.run_config import ForgettingSection
from smoa_lab.data.sources.general_text import describe, passages
from smoa_lab.lessons.lesson import Stage
from smoa_lab.scoring.forgetting import at_least, text_length, text_losses
from smoa_lab.scoring.row_losses import Losses


class ForgottenText:
    """Looks at a model of the config ``base`` before and after training. The text is read at once: a mistake in the
    run's config shows before any work."""

    def __init__(self, wanted: ForgettingSection, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig) -> None:
        self.source, self.tokenizer = wanted.text, tokenizer
        length = text_length(base)
        self.texts = at_least(tokenizer, passages(wanted.text), wanted.tokens, length) if wanted.tokens else []
        self.losses: dict[Stage, Losses] = {}

    def look(self, model: Any, stage: Stage) -> None:
        """Measure the loss."""
        if self.texts:
            self.losses[stage] = text_losses(model, self.tokenizer, self.texts)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` has of it: the losses in nats per token, and their change with its standard error,
        paired by passage; None if it was not measured."""
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
