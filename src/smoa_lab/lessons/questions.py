"""A run on questions with answers: the loss is on the answers, and held-out questions are scored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from smoa_lab.basics.extras import require
from smoa_lab.basics.positions import check_positions
from smoa_lab.config.run_config import RunConfig
from smoa_lab.data.prompts import Encoded, PromptEncoder
from smoa_lab.data.selection import Selection, used_content
from smoa_lab.lessons.lesson import Lesson, check_validation, checked_arguments
from smoa_lab.lessons.question_looks import QuestionLooks
from smoa_lab.models.base_models import load_base_model
from smoa_lab.models.needs import input_needs
from smoa_lab.scoring.answer_loss import AnswerTrainer, collate
from smoa_lab.scoring.likelihood import score_answers
from smoa_lab.scoring.row_losses import Losses


@dataclass(frozen=True)
class Questions(Lesson):
    """Records and the encoder that puts them into the model's tokens."""

    config: RunConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    records: Selection

    @property
    def title(self) -> str:
        return ", ".join(self.config.data.tasks)

    def arguments(self) -> TrainingArguments:
        check_validation(self.config, len(self.records.validation), "questions")
        return checked_arguments(TrainingArguments(**self.config.training))

    def looks(self, alone: bool) -> QuestionLooks:
        return QuestionLooks(self.encoder, self.records.test, self.config.task, alone)

    def trainer(self, model: Any, arguments: Any, **options: Any) -> Trainer:
        return AnswerTrainer(
            model=model,
            args=arguments,
            train_dataset=[example.row for example in self.examples],
            eval_dataset=[self.encoder.example(record).row for record in self.records.validation] or None,
            data_collator=partial(collate, pad=self.encoder.pad),
            **options,
        )

    def held_out_losses(self, model: Any) -> Losses:
        sequences = [self.encoder.gold(record) for record in self.records.test]
        scores = score_answers(model, sequences, self.encoder.pad, self.config.task.eval_batch_tokens)
        return Losses([score.loss for score in scores], [len(score.nll) for score in scores])

    def account(self) -> dict[str, Any]:
        return self.records.account

    @property
    def data_content(self) -> str:
        return used_content(self.records)

    def truncation(self) -> dict[str, Any]:
        return {"truncation": _truncation(self.examples)}

    @cached_property
    def examples(self) -> list[Encoded]:
        """Prompt and gold answer of each training record."""
        return [self.encoder.example(record) for record in self.records.train]


def prepare(config: RunConfig, records: Selection | None = None) -> Questions:
    """Load data, unless given, and model; what cannot be loaded fails here, before any work.

    Raises:
        ConfigError: the model has fewer positions than ``task.max_length``.
        DataError: data or model cannot be loaded, or a package is missing.
    """
    require(input_needs(config))
    records = config.data.select() if records is None else records
    base, tokenizer = load_base_model(config.model)
    check_positions(base.config, "task.max_length", config.task.max_length, "questions")
    encoder = PromptEncoder(tokenizer, config.task.template, config.task.answer, config.task.max_length)
    return Questions(config, base, tokenizer, encoder, records)


def _truncation(examples: list[Encoded]) -> dict[str, int]:
    return {
        "prompts_cut": sum(example.cut > 0 for example in examples),
        "prompt_tokens_cut": sum(example.cut for example in examples),
        "answers_cut": sum(example.answer_cut > 0 for example in examples),
    }
