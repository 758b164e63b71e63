"""Scores a model, with or without an adapter, on a config's held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from smoa import ConfigError, DataError
from smoa_lab.base_models import to_device
from smoa_lab.config.run import ForgettingSection
from smoa_lab.open_run import Opened
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import provenance


def evaluate_run(opened: Opened, adapter: Path | None = None) -> dict[str, Any]:
    """The scores with their provenance, of the run's adapter or of another ``adapter`` of its base.

    Rows that the run was trained on are left out; ``trained_on`` counts them. Where answers are scored, the base of an
    adapter is scored too.
    """
    if opened.config is None:
        raise ConfigError(f"{opened.place}: is neither a finished run (metrics.json) nor a config file")
    config = opened.config.model_copy(update={"forgetting": ForgettingSection(tokens=0)})  # whose text may be gone
    adapter = adapter or opened.model.adapter
    run = load_run(config, trains=False)
    evaluation, trained_on = run.evaluation(answers=False, folder=opened.folder)
    if not evaluation.rows:
        raise DataError("data: nothing is held out that could be scored; give other rows as data.test")
    if not config.training.get("use_cpu"):
        to_device(run.base)
    if adapter is not None and evaluation.metric is not None:
        evaluation.measure(run.base, "before")
    model: Any = run.base if adapter is None else PeftModel.from_pretrained(run.base, str(adapter))
    evaluation.measure(model, "after")
    return {
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.arguments().seed, next(model.parameters()).device),
        "digests": run.digests,
        "data": run.data.account,
        "trained_on": trained_on,
        "before": evaluation.scores().get("before"),
        "scores": evaluation.scores()["after"],
    }
