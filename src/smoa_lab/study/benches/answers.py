"""Studies of causal language models, whose loss is on the answers, as in ``smoa train``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import TrainerCallback

from smoa_lab.config.run_config import RunConfig
from smoa_lab.data.records import Record
from smoa_lab.lessons.questions import Questions, prepare
from smoa_lab.scoring.held_out import Outcome, answer_outcomes
from smoa_lab.study.benches.bench import Bench, Fitted, fit_arguments


class AnswerBench(Bench):
    """Trains with the loss on the answers only; scores the gold answers' likelihood."""

    def _prepare(self, config: RunConfig) -> Questions:
        ready = prepare(config, self.records)
        self.encoder = ready.encoder
        return ready

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> Fitted:
        return Fitted(*self._prepare(config).fit(fit_arguments(config), checkpoint, check))

    def _outcomes(self, model: nn.Module | None, config: RunConfig, records: Sequence[Record]) -> list[Outcome]:
        scored = self._prepare(config).base if model is None else model
        return answer_outcomes(scored, self.encoder, records, config.task.eval_batch_tokens)
