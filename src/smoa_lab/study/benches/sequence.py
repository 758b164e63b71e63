"""Studies of learning without forgetting: a first task is trained once, then each entry trains a second one."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.errors import ConfigError
from smoa_lab.basics.extras import require
from smoa_lab.config.run_config import RunConfig, TaskSection, check_config
from smoa_lab.data.prompts import PromptEncoder
from smoa_lab.data.selection import Selection
from smoa_lab.lessons.questions import Questions
from smoa_lab.models.needs import training_needs
from smoa_lab.scoring.forgetting import text_losses, whole_text
from smoa_lab.scoring.held_out import answer_outcomes, score_outcomes
from smoa_lab.scoring.row_losses import Losses
from smoa_lab.study.benches.answers import AnswerBench
from smoa_lab.study.benches.bench import Part, answered
from smoa_lab.study.benches.changes import weight_changes
from smoa_lab.study.benches.first_stage import First, FirstStage
from smoa_lab.study.entry import Entry


class SequenceBench(AnswerBench):
    """Trains the second task on the model of the first; scores both on their test parts, and the text elsewhere."""

    def __init__(self, shared: dict[str, Any], elsewhere: dict[str, Any] | None, first: First, folder: Path) -> None:
        super().__init__(shared, elsewhere)
        self.first = first
        self.folder = folder

    def first_config(self, place: str = "study") -> RunConfig:
        """The whole run of the first task; raises ConfigError with all problems of it."""
        own = self.first.model_dump(include={"data", "method", "adapter"})
        rate = {"learning_rate": self.first.learning_rate, "seed": self.first.seed}
        laid = {key: {**(self.shared.get(key) or {}), **getattr(self.first, key)} for key in ("model", "task")}
        training = {**(self.shared.get("training") or {}), **self.first.training, **rate}
        return check_config({**own, **laid, "training": training}, place)

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        """With that of the first task, which decides where an entry starts."""
        return {**super().stored_config(config), "first": self._stage.described}

    def check_needs(self, entry: Entry) -> None:
        """Also for the first task."""
        super().check_needs(entry)
        require(training_needs(self.first_config()))

    @cached_property
    def first_records(self) -> Selection:
        """The records of the first task; read once."""
        records = self.first_config().data.select()
        if not records.test:
            raise ConfigError("first.data.test_examples: a study needs a test part; it has no questions")
        return records

    @cached_property
    def _stage(self) -> FirstStage:
        dtype = self.shared["model"].get("dtype", "float32")
        return FirstStage(self.first_config(), self.folder / "work" / "first", dtype)

    def before(self, config: RunConfig) -> dict[str, Any]:
        """Scores of the first task's model, from which every entry starts; it is trained if that was not done."""

        def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
            self.encoder = _encoder(tokenizer, config.task)
            return self._measured(model, config)

        return self._stage.scores(self.first_records, measure)

    def _prepare(self, config: RunConfig) -> Questions:
        self.before(config)
        place = {"name": self._stage.model.name}
        return super()._prepare(config.model_copy(update={"model": config.model.model_copy(update=place)}))

    def _scores(self, model: nn.Module | None, config: RunConfig, part: Part) -> dict[str, Any]:
        before = self.before(config)
        if model is None:
            return before
        after = self._measured(model, config)
        change = weight_changes(model, self._prepare(config).base)
        return {**after, "forgot": _forgot(before, after), "change": change}

    def _measured(self, model: nn.Module, config: RunConfig) -> dict[str, Any]:
        """Scores of the second task as in other studies, of the first task, and of the text elsewhere."""
        task, records = self.first_config().task, self.first_records
        encoder = _encoder(self.encoder.tokenizer, task)
        outcomes = answer_outcomes(model, encoder, records.test, task.eval_batch_tokens)
        first = {
            "sha256": records.account["used"]["test"]["sha256"],
            "scores": {name: asdict(score) for name, score in score_outcomes(outcomes).items()},
            "questions": answered(outcomes),
        }
        return {**super()._scores(model, config, "test"), "first": first}

    def _away(self, model: nn.Module | None, config: RunConfig) -> dict[str, Any]:
        """The loss on the records' whole texts, and that of each."""
        assert model is not None  # the untouched model is scored as the first task's
        found = text_losses(model, self.encoder.tokenizer, [whole_text(record) for record in self._elsewhere_records])
        return {"elsewhere": found.mean, "texts": asdict(found)}


def _encoder(tokenizer: PreTrainedTokenizerBase, task: TaskSection) -> PromptEncoder:
    return PromptEncoder(tokenizer, task.template, task.answer, task.max_length)


def _forgot(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The rise of the loss on the first task and on the text elsewhere."""
    pairs = {"first": [one["first"]["questions"] for one in (before, after)]}
    if "texts" in before:
        pairs["elsewhere"] = [before["texts"], after["texts"]]
    losses = {name: [Losses(one["nll"], one["tokens"]) for one in pair] for name, pair in pairs.items()}
    return {name: asdict(late.change_from(early)) for name, (early, late) in losses.items()}
