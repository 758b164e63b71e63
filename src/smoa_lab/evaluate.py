"""Scores a model, with or without an adapter, on a config's held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smoa.errors import DataError
from smoa_lab.base_models import to_device
from smoa_lab.config.run import RunConfig
from smoa_lab.open_run import with_saved_adapter
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder, provenance


def evaluate_run(config: RunConfig, adapter: Path | None = None, folder: RunFolder | None = None) -> dict[str, Any]:
    """The scores per task with their provenance: the loss of rows, or of the gold answers and the accuracy of the
    likeliest choice, for free answers the exact match of greedy decoding. Rows that the run in ``folder`` was trained
    on are left out; ``trained_on`` counts them, and is None where the run didn't keep which they were.

    Raises:
        DataError: nothing is held out, or model or data cannot be loaded.
    """
    run = load_run(config, trains=False)
    if not config.training.get("use_cpu"):
        to_device(run.base)
    model: Any = run.base if adapter is None else with_saved_adapter(run.base, adapter)
    evaluation = run.evaluation(alone=False)
    evaluation.rows, trained_on = (evaluation.rows, 0) if folder is None else folder.not_trained_on(evaluation.rows)
    evaluation.measure(model, "after")
    if not evaluation.evaluation:
        of_rows = "test, or a larger test_part" if folder is None else "other rows as test"
        remedy = of_rows if config.has_rows else "other questions, or a larger test_examples"
        raise DataError(f"data: nothing is held out that could be scored; give {remedy}")
    return {
        "format": 1,
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.data.seed, next(model.parameters()).device),
        "data": run.account(),
        "trained_on": trained_on,
        "scores": evaluation.evaluation["after"],
    }
