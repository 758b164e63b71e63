"""Scores a model, with or without an adapter, on a config's held-out data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import RunModel, to_device
from smoa_lab.config.run import ForgettingSection, RunConfig
from smoa_lab.open_run import open_run, with_saved_adapter
from smoa_lab.scoring.evaluation import CHANGES_LOSS
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder, provenance
from smoa_lab.training.train import FORMAT

OF_TRAINING = "use_cpu", "assistant_only_loss", "completion_only_loss", "beta", "loss_type", *CHANGES_LOSS
ACTS = ("model.", "data.", "scoring.part=", *(f"training.{key}=" for key in OF_TRAINING))
"""The values that a score depends on."""


def check_overrides(overrides: Iterable[str]) -> None:
    """Raise ConfigError if one of them changes no score."""
    for override in overrides:
        if "=" in override and not override.startswith(ACTS):
            known = ", ".join(key.rstrip("=") + "*" * key.endswith(".") for key in ACTS)
            raise ConfigError(f"{override}: changes nothing that is scored; leave it out. What may change: {known}")


def evaluate_run(
    config: RunConfig, adapter: Path | None = None, folder: RunFolder | None = None, base: str | None = None
) -> dict[str, Any]:
    """The scores with their provenance. Rows that the run in ``folder`` was trained on are left out; ``trained_on``
    counts them, and is None where the run didn't keep which they were. ``base`` is used instead of its base."""
    config = config.model_copy(update={"forgetting": ForgettingSection(tokens=0)})  # whose text may be gone
    run = load_run(config, trains=False)
    evaluation, trained_on = run.evaluation(answers=False, folder=folder)
    if not evaluation.rows:
        raise DataError("data: nothing is held out that could be scored; give other rows as data.test")
    # the loss of preferences compares with the base model, and so do answers
    untouched, compares = run.base, folder is not None and (evaluation.prefers or evaluation.metric is not None)
    if compares and folder is not None and adapter is None:  # a whole model was trained
        name = open_run(folder.path, base=base, untouched=True)[0].model.name
        untouched = RunModel(config.model.model_copy(update={"name": name}), config.data.template).load()
    if not config.training.get("use_cpu"):
        to_device(run.base)
        to_device(untouched)
    if compares:
        evaluation.measure(untouched, "before")
    del untouched
    model: Any = run.base if adapter is None else with_saved_adapter(run.base, adapter)
    evaluation.measure(model, "after")
    return {
        "format": FORMAT,
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.arguments().seed, next(model.parameters()).device),
        "digests": run.digests,
        "data": run.data.account,
        "trained_on": trained_on,
        "before": evaluation.scores().get("before"),
        "scores": evaluation.scores()["after"],
    }
