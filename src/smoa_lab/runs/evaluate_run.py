"""Scores a model, with or without an adapter, on a config's held-out questions by one protocol."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.basics.extras import require
from smoa_lab.config.run_config import RunConfig
from smoa_lab.scoring.generation import evaluate_by_generation
from smoa_lab.scoring.held_out import evaluate_records
from smoa_lab.scoring.protocol import Protocol
from smoa_lab.training.needs import evaluation_needs
from smoa_lab.training.questions import Questions, prepare
from smoa_lab.training.run_folder import provenance

logger = logging.getLogger(__name__)


def evaluate_run(
    config: RunConfig,
    adapter: Path | None = None,
    protocol: Protocol = "likelihood",
    batch_size: int = 16,
    num_beams: int = 1,
    output: Path | None = None,
) -> dict[str, Any]:
    """The scores per task with their provenance; also written to ``output``, which must not exist.

    ``likelihood`` gives the gold answers' loss and the accuracy of the likeliest choice, or for free answers the exact
    match of greedy decoding; ``lm-eval`` lets the library of that name compute acc and acc_norm, for choices only (the
    two agree); ``generation`` generates text and extracts the answer from it.

    Raises:
        ConfigError: ``output`` exists.
        DataError: nothing is held out, model or data cannot be loaded, or a package is missing.
    """
    if output is not None and output.exists():
        raise ConfigError(f"{output}: exists, and results are never overwritten; choose another --output")
    require(evaluation_needs(config, protocol))
    ready = prepare(config)
    if not ready.records.test:
        raise DataError("data.test_examples: no held-out questions to score")
    model: Any = ready.base if adapter is None else PeftModel.from_pretrained(ready.base, str(adapter))
    logger.info("Scoring %d questions by %s", len(ready.records.test), protocol)
    result = {
        "format": 1,
        "protocol": protocol,
        "adapter": str(adapter) if adapter else None,
        "config": config.model_dump(mode="json"),
        "provenance": provenance(config.data.seed, next(model.parameters()).device),
        "data": ready.records.account,
        **_scores(model, config, ready, protocol, batch_size, num_beams),
    }
    if output is not None:
        write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _scores(
    model: Any, config: RunConfig, ready: Questions, protocol: Protocol, batch_size: int, num_beams: int
) -> dict[str, Any]:
    records, families = ready.records.test, ready.records.families
    if protocol == "generation":
        scores, texts = evaluate_by_generation(model, ready.encoder, records, families, batch_size, num_beams)
        written = [{**asdict(one.record), "text": one.text, "found": one.found, "wanted": one.wanted} for one in texts]
        return {"scores": {name: asdict(score) for name, score in scores.items()}, "texts": written}
    tokens = config.task.eval_batch_tokens
    if protocol == "lm-eval":
        from smoa_lab.scoring.harness import evaluate_with_harness

        return {"scores": evaluate_with_harness(model, ready.encoder, records, tokens)}
    own = evaluate_records(model, ready.encoder, records, tokens)
    return {"scores": {name: asdict(score) for name, score in own.items()}}
