"""``smoa eval``: score a model, with or without an adapter, on a config's held-out questions by one protocol."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.config.run_config import RunConfig, load_config
from smoa_lab.scoring.generation import evaluate_by_generation
from smoa_lab.scoring.held_out import evaluate_records
from smoa_lab.training.run_folder import RunFolder, provenance
from smoa_lab.training.train_run import Prepared, prepare

logger = logging.getLogger(__name__)

Protocol = Literal["likelihood", "lm-eval", "generation"]


def open_run(place: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, Path | None]:
    """The config and the adapter of a finished run folder; of a config file the config alone.

    A run that trained the whole model has no adapter; its config then names the trained model.

    Raises:
        ConfigError: neither, or the run is not finished.
    """
    path = Path(place)
    if path.is_file():
        return load_config(path, overrides), None
    folder = RunFolder(path)
    if not folder.finished:
        raise ConfigError(f"{path}: is neither a config file nor the folder of a finished run (with metrics.json)")
    config = load_config(folder.config, overrides)
    if config.method == "full":
        model = config.model.model_copy(update={"name": str(folder.adapter)})
        return config.model_copy(update={"model": model}), None
    return config, folder.adapter


def evaluate(
    config: RunConfig,
    adapter: Path | None = None,
    protocol: Protocol = "likelihood",
    batch_size: int = 16,
    num_beams: int = 1,
    output: Path | None = None,
) -> dict[str, Any]:
    """The scores per task with their provenance; written to ``output`` too, which must not exist.

    ``likelihood`` gives the gold answers' loss and the accuracy of the likeliest choice, or for free answers the exact
    match of greedy decoding; ``lm-eval`` has the library of that name compute acc and acc_norm, choices only (the two
    agree); ``generation`` has the model write and extracts the answer.

    Raises:
        ConfigError: ``output`` exists.
        DataError: nothing is held out, or model or data cannot be had.
    """
    if output is not None and output.exists():
        raise ConfigError(f"{output}: exists; results are never overwritten, choose another --output")
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
    model: Any, config: RunConfig, ready: Prepared, protocol: Protocol, batch_size: int, num_beams: int
) -> dict[str, Any]:
    records, families = ready.records.test, ready.records.families
    if protocol == "generation":
        scores, texts = evaluate_by_generation(model, ready.encoder, records, families, batch_size, num_beams)
        written = [{**asdict(one.record), "text": one.text, "found": one.found, "wanted": one.wanted} for one in texts]
        return {"scores": {name: score.to_dict() for name, score in scores.items()}, "texts": written}
    tokens = config.task.eval_batch_tokens
    if protocol == "lm-eval":
        return {"scores": _harness()(model, ready.encoder, records, tokens)}
    own = {name: score.to_dict() for name, score in evaluate_records(model, ready.encoder, records, tokens).items()}
    return {"scores": own}


def _harness() -> Callable[..., dict[str, Any]]:
    try:
        from smoa_lab.scoring.harness import evaluate_with_harness
    except ImportError as error:
        raise DataError("protocol lm-eval needs the library: pip install lm-eval") from error
    return evaluate_with_harness
