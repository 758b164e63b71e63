"""Scores a model, with or without an adapter, on a config's held-out questions by one protocol."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.extras import require
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.config.rows_config import RowsConfig
from smoa_lab.config.run_config import RunConfig
from smoa_lab.lessons.lesson import Lesson
from smoa_lab.lessons.questions import Questions
from smoa_lab.models.needs import evaluation_needs
from smoa_lab.scoring.generation import evaluate_by_generation
from smoa_lab.scoring.protocol import Protocol
from smoa_lab.training.run_folder import provenance
from smoa_lab.training.train_run import open_lesson

logger = logging.getLogger(__name__)


def evaluate_run(
    config: RunConfig | RowsConfig,
    adapter: Path | None = None,
    protocol: Protocol = "likelihood",
    batch_size: int = 16,
    num_beams: int = 1,
) -> dict[str, Any]:
    """The scores per task with their provenance.

    ``likelihood`` gives the gold answers' loss and the accuracy of the likeliest choice, or for free answers the exact
    match of greedy decoding; ``lm-eval`` lets the library of that name compute acc and acc_norm, for choices only (the
    two agree); ``generation`` generates text and extracts the answer from it.

    Raises:
        ConfigError: rows are to be scored by another protocol than likelihood.
        DataError: nothing is held out, model or data cannot be loaded, or a package is missing.
    """
    if isinstance(config, RowsConfig) and protocol != "likelihood":
        raise ConfigError(f"--protocol {protocol}: is for questions; held-out rows are scored by likelihood")
    if isinstance(config, RunConfig):
        require(evaluation_needs(config, protocol))
    lesson = open_lesson(config)
    model: Any = lesson.base if adapter is None else PeftModel.from_pretrained(lesson.base, str(adapter))
    logger.info("Scoring held-out data by %s", protocol)
    result: dict[str, Any] = {
        "format": 1,
        "protocol": protocol,
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.data.seed, next(model.parameters()).device),
        "data": lesson.account(),
        **_scores(model, lesson, protocol, batch_size, num_beams),
    }
    return without_secrets(result)


def _scores(model: Any, lesson: Lesson, protocol: Protocol, batch_size: int, num_beams: int) -> dict[str, Any]:
    if not isinstance(lesson, Questions):
        return {"scores": _likelihood(model, lesson)}
    records, families = lesson.records.test, lesson.records.families
    if not records:
        raise DataError("data.test_examples: no held-out questions to score")
    if protocol == "generation":
        scores, texts = evaluate_by_generation(model, lesson.encoder, records, families, batch_size, num_beams)
        written = [{**asdict(one.record), "text": one.text, "found": one.found, "wanted": one.wanted} for one in texts]
        return {"scores": {name: asdict(score) for name, score in scores.items()}, "texts": written}
    if protocol == "lm-eval":
        from smoa_lab.scoring.harness import evaluate_with_harness

        tokens = lesson.config.task.eval_batch_tokens
        return {"scores": evaluate_with_harness(model, lesson.encoder, records, tokens)}
    return {"scores": _likelihood(model, lesson)}


def _likelihood(model: Any, lesson: Lesson) -> dict[str, Any]:
    looks = lesson.looks(alone=False)
    looks.look(model, "after")
    if not looks.evaluation:
        raise DataError("data: nothing is held out that could be scored; give test, or a larger test_part")
    return looks.evaluation["after"]
