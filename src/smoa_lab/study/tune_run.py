"""Searches the learning rate of a single run, as a study does for each of its entries."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from smoa.atomic import check_place
from smoa.errors import ConfigError
from smoa_lab.base_models import with_rate
from smoa_lab.config.run import RunConfig
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.search import Tuned, first_index, next_indices, rate
from smoa_lab.study.study import Entry, Study, Tuning
from smoa_lab.study.trials import Trial, TrialStore
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

START = 2e-5
"""Where the search begins for a whole model whose config has no learning rate."""
OWN = ("learning_rate", "output_dir", "seed")
"""What the search sets itself."""


def tune_run(config: RunConfig, max_runs: int = 6) -> Tuned:
    """Train ``config`` at half decades and then quarter decades, and score each run on the validation part: on
    questions by the loss of the gold answers, on rows by the trainer's own loss.

    The runs are kept beside the run's folder, in ``OUTPUT_DIR-tuning``; the search resumes there.

    Raises:
        ConfigError: there is no validation part, or the folder holds runs of another config.
        DataError: model or data cannot be loaded.
    """
    config = with_rate(config)
    folder = config.folder.with_name(f"{config.folder.name}-tuning")
    check_place(folder / "untouched.json")
    start, seed = float(config.training.get("learning_rate", START)), int(config.training.get("seed", 42))
    if config.has_rows:
        return _tune_rows(config, TrialStore(folder), start, seed, max_runs)
    shared = config.model_dump(mode="json", include={"model", "data", "task", "early_stopping"})
    training = {key: value for key, value in config.training.items() if key not in OWN}
    study = Study(
        folder=folder,
        shared={**shared, "training": training},
        entries={"run": Entry(method=config.method, adapter=config.adapter, learning_rate=start)},
        tuning=Tuning(seed=seed, max_runs=max_runs, refine=True),
    )
    check_place(study.folder / "untouched.json")
    comparison = Comparison(study)
    if not comparison.runner.records.validation:
        raise ConfigError(
            "data: leaves no validation questions, by which rates are compared; set data.validation_examples, or a "
            "larger data.validation_part"
        )
    return comparison.tune("run")


def _tune_rows(config: RunConfig, store: TrialStore, start: float, seed: int, max_runs: int) -> Tuned:
    losses = dict[int, float | None]()
    while indices := next_indices(first_index(start), losses, max_runs, refine=True):
        for index in indices:
            trial = Trial("tuning", "run", rate(index), seed)
            own: dict[str, Any] = {"learning_rate": trial.learning_rate, "seed": seed}
            if not config.training.get("load_best_model_at_end"):
                own["eval_strategy"] = "epoch"  # at the end, too; else no rows would be held out for it
            tried = _with(config, **own)
            losses[index] = store.get(trial.name, tried.model_dump(mode="json"), partial(_train_rows, tried))["loss"]
            logger.info("%s: loss %s", trial.name, losses[index])
    return Tuned.of(losses)


def _train_rows(config: RunConfig, work: Path) -> dict[str, Any]:
    """A trial's JSON: its config, and the loss on the validation rows of the adapter that a run would keep."""
    config = _with(config, output_dir=str(work))
    run = load_run(config)
    if not run.data.account["parts"].get("validation"):
        raise ConfigError(
            "data: leaves no validation rows, by which rates are compared; give a larger data.validation_part"
        )
    checkpoint = RunFolder(work).start(config.to_yaml(), run.inputs())
    _, trainer, _ = run.fit(run.arguments(), checkpoint)
    loss = trainer.evaluate()["eval_loss"]  # of the adapter that is kept, which need not be the last
    return {"config": config.model_dump(mode="json"), "loss": loss}


def _with(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": {**config.training, **training}})
