"""Trains and scores one entry of a study, by the loss on answers."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model
from smoa_lab.config.run import DataSection, RunConfig, check_config
from smoa_lab.data.rows import Row
from smoa_lab.data.tasks import Selection
from smoa_lab.scoring.evaluation import answer_outcomes, score_outcomes
from smoa_lab.study.study import Entry
from smoa_lab.training.adapting import check_adapter
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.run_folder import RunFolder

Part = Literal["validation", "test"]

PARAMETER_TOLERANCE = 0.02
"""How far the trainable parameters of an entry may differ from what it declares."""


class Runner:
    """Trains entries that share ``shared`` (a run's config without method, adapter, learning rate and seed), as
    ``smoa train`` does, and scores the gold answers' likelihood."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self.shared = shared

    def config(
        self, entry: Entry, learning_rate: float, seed: int, place: str = "study", work: Path = Path("runs/study")
    ) -> RunConfig:
        """The whole run of an entry; raises ConfigError with all problems of it."""
        training = {**(self.shared.get("training") or {}), **entry.training}
        training |= {"learning_rate": learning_rate, "seed": seed, "output_dir": str(work)}
        model = {**(self.shared.get("model") or {}), **entry.model}
        own = {"method": entry.method, "adapter": entry.adapter, "model": model, "training": training}
        checked = check_config({**self.shared, **own}, place)
        _ = checked.questions  # refuses rows
        return checked

    def check_needs(self, entry: Entry) -> None:
        """Raise ConfigError if the adapter of an entry does not fit the model."""
        config = self.config(entry, entry.learning_rate, seed=0)
        check_adapter(empty_model(config.model), config.method, config.adapter)

    def run(self, entry: Entry, learning_rate: float, seed: int, part: Part, work: Path) -> dict[str, Any]:
        """Train, then score ``part``: plain values for a trial's JSON. An interrupted run goes on in ``work``."""
        config = self.config(entry, learning_rate, seed, work=work)
        self._part(part)
        loaded = load_run(config, self.records)
        checkpoint = RunFolder(work).start(config.to_yaml(), loaded.inputs())
        model, trainer, seconds = loaded.fit(loaded.arguments(), checkpoint, ParameterCheck(entry))
        return {
            "config": config.model_dump(mode="json"),
            "parameters": trained_parameters(model),
            "seconds": None if checkpoint else round(seconds, 1),  # of a resumed run it would be a part only
            "steps": trainer.state.global_step,
            "training_loss": trainer.state.log_history[-1].get("train_loss"),
            **self._scores(model, loaded, part),
        }

    def untouched_config(self, entry: Entry) -> RunConfig:
        """The config of the shared model without training; ``entry`` only lends a method that is valid for it."""
        lent = Entry(method=entry.method, adapter=entry.adapter, learning_rate=entry.learning_rate)
        config = self.config(lent, lent.learning_rate, seed=0)
        own = {"learning_rate", "seed", "output_dir"}
        training = {key: value for key, value in config.training.items() if key not in own}
        return config.model_copy(update={"method": "full", "adapter": {}, "training": training})

    def untouched(self, config: RunConfig, part: Part) -> dict[str, Any]:
        """Scores without any training, for comparison."""
        loaded = load_run(config, self.records)
        return {"config": config.model_dump(mode="json"), "parameters": 0, **self._scores(loaded.base, loaded, part)}

    @cached_property
    def records(self) -> Selection:
        """The records of all runs; read once."""
        return DataSection.model_validate(self.shared["data"]).select()

    def _part(self, part: Part) -> list[Row]:
        records: list[Row] = getattr(self.records, part)
        if not records:
            raise ConfigError(f"shared.data.{part}_examples: a study needs a {part} part; it has no questions")
        return records

    def _scores(self, model: nn.Module, loaded: LoadedRun, part: Part) -> dict[str, Any]:
        """``scores`` by task and, of each question in order, so that entries can be paired, its task, the loss and
        tokens of the gold answer, and whether it was answered right."""
        batch = loaded.config.task.eval_batch_tokens
        outcomes = answer_outcomes(model, loaded.encoder, self._part(part), batch)
        return {
            "part": part,
            "sha256": self.records.account["used"][part]["sha256"],
            "scores": {name: asdict(score) for name, score in score_outcomes(outcomes).items()},
            "questions": {
                "task": [outcome.row.task for outcome in outcomes],
                "nll": [round(outcome.gold_nll, 4) for outcome in outcomes],
                "tokens": [outcome.gold_tokens for outcome in outcomes],
                "right": [int(outcome.right) for outcome in outcomes],
            },
        }


def trained_parameters(model: nn.Module) -> int:
    """How many are trainable."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


class ParameterCheck(TrainerCallback):
    """Raises ConfigError before the first step if an entry trains another number of parameters than it declares."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        trained, wanted = trained_parameters(model), self.entry.parameters
        if wanted is not None and abs(trained - wanted) > PARAMETER_TOLERANCE * wanted:
            raise ConfigError(
                f"entries: {self.entry.method} {self.entry.adapter} trains {trained:,} parameters, not {wanted:,} to "
                f"within {PARAMETER_TOLERANCE:.0%}; change r (smoa budget lists the choices) or what it declares"
            )
