"""Scores a model, with or without an adapter, on a config's held-out data by one protocol."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import evaluation_needs, to_device
from smoa_lab.basics.extras import require
from smoa_lab.basics.plain import without_secrets
from smoa_lab.config.run import RunConfig
from smoa_lab.data.rows import question_values
from smoa_lab.data.tasks import Selection
from smoa_lab.open_run import with_saved_adapter
from smoa_lab.scoring.generation import evaluate_by_generation
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import provenance

logger = logging.getLogger(__name__)

Protocol = Literal["likelihood", "generation"]


def evaluate_run(
    config: RunConfig,
    adapter: Path | None = None,
    protocol: Protocol = "likelihood",
    batch_size: int = 16,
    num_beams: int = 1,
) -> dict[str, Any]:
    """The scores per task with their provenance.

    ``likelihood`` gives the loss of rows, or of the gold answers and the accuracy of the likeliest choice, for free
    answers the exact match of greedy decoding; ``generation`` generates text and extracts the answer from it.

    Raises:
        ConfigError: rows are to be scored by another protocol than likelihood.
        DataError: nothing is held out, model or data cannot be loaded, or a package is missing.
    """
    if not config.has_rows:
        require(evaluation_needs(config, protocol))
    elif protocol != "likelihood":
        raise ConfigError(f"--protocol {protocol}: is for questions; held-out rows are scored by likelihood")
    run = load_run(config)
    if not config.training.get("use_cpu"):
        to_device(run.base)
    model: Any = run.base if adapter is None else with_saved_adapter(run.base, adapter)
    logger.info("Scoring held-out data by %s", protocol)
    result: dict[str, Any] = {
        "format": 1,
        "protocol": protocol,
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.data.seed, next(model.parameters()).device),
        "data": run.account(),
    }
    if protocol == "generation":
        assert isinstance(run.data, Selection)
        if not run.data.test:
            raise DataError("data.test_examples: no held-out questions to score")
        scores, texts = evaluate_by_generation(
            model, run.encoder, run.data.test, run.data.families, batch_size, num_beams
        )
        result["scores"] = {name: asdict(score) for name, score in scores.items()}
        result["texts"] = [
            {**question_values(answer.row), "text": answer.text, "found": answer.found, "wanted": answer.wanted}
            for answer in texts
        ]
    else:
        evaluation = run.evaluation(alone=False)
        evaluation.measure(model, "after")
        if not evaluation.evaluation:
            part = "test, or a larger test_part" if config.has_rows else "a larger test_examples"
            raise DataError(f"data: nothing is held out that could be scored; give {part}")
        result["scores"] = evaluation.evaluation["after"]
    return without_secrets(result)
