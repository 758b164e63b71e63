"""Trains an adapter as a run's config says, and saves everything in the run's folder."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
from peft import PeftConfig
from transformers import TrainingArguments

from smoa.atomic import new_file, new_files, write_whole
from smoa.layers.distributed import from_rank_zero
from smoa_lab.base_models import described_base, empty_model, to_device, with_rate
from smoa_lab.basics.plain import portable
from smoa_lab.config.run import RunConfig
from smoa_lab.pages.run_card import run_card, samples_text
from smoa_lab.pages.run_charts import draw_run
from smoa_lab.scoring.evaluation import Forgetting
from smoa_lab.training.adapting import check_adapter
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.run_folder import RunFolder, is_first_process, peak_memory, provenance

logger = logging.getLogger(__name__)


def train(config: RunConfig, run: LoadedRun | None = None) -> dict[str, Any]:
    """Train, evaluate, save; the run's metrics, as ``metrics.json`` has them, which has null for what is not finite.

    Nothing is written before config, data and model are known to be good.

    Raises:
        ConfigError: the run's folder contains a finished run or one of another config, or another process trains into
            it, or the adapter does not fit the model.
        DataError: model or data cannot be loaded.
    """
    config = config if run else with_rate(config)
    folder, text = RunFolder(config.folder), config.to_yaml()
    folder.check(text)
    if run is None:
        check_adapter(empty_model(config.model), config.method, config.adapter)
        run = load_run(config)
    arguments = run.arguments()
    forgetting = Forgetting(config.forgetting.text, config.forgetting.tokens, run.tokenizer, run.base.config)
    with folder.alone():
        checkpoint = folder.start(text, run.inputs() if is_first_process() else {})
        with folder.logging():
            if checkpoint:
                logger.info("Resuming from %s", checkpoint)
            return _train(run, arguments, forgetting, folder, checkpoint)


def _train(
    run: LoadedRun, arguments: TrainingArguments, forgetting: Forgetting, folder: RunFolder, checkpoint: str | None
) -> dict[str, Any]:
    if arguments.process_index > 0:
        logging.getLogger("smoa_lab").setLevel(logging.WARNING)  # rank 0 logs the rest
    if arguments.world_size == 1 and not (arguments.deepspeed or arguments.fsdp):  # these place a model themselves
        to_device(run.base, arguments.device)  # as the Trainer will; scoring before it would take the CPU
    evaluation = run.evaluation(alone=arguments.world_size == 1)
    if not evaluation.rows:
        logger.info("No %s are held out, so none are scored", "rows" if run.config.has_rows else "questions")
    evaluation.measure(run.base, "before")
    forgetting.measure(run.base, "before")
    model, trainer, seconds = run.fit(arguments, checkpoint)
    evaluation.measure(model, "after")
    forgetting.measure(model, "after")
    trainable = sum(_entries(parameter) for parameter in model.parameters() if parameter.requires_grad)
    total = sum(map(_entries, model.parameters()))
    history = trainer.state.log_history
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    is_whole = tokens and not checkpoint  # TRL counts a resumed run's tokens from 0 again
    speed = {"tokens": tokens[-1], "tokens_per_second": round(tokens[-1] / seconds, 1)} if is_whole else {}
    metrics = {
        "format": 1,
        "config": portable(run.config.model_dump(mode="json")),
        "provenance": provenance(arguments.seed, arguments.device),
        "parameters": {"trainable": trainable, "total": total, "percent": round(100 * trainable / total, 4)},
        "data": portable(run.account() | run.truncation()),
        "training": {
            "trainer": type(trainer).__name__.removeprefix("Sparse"),
            "seconds": round(seconds, 1),
            "steps": trainer.state.global_step,
            "processes": arguments.world_size,
            **speed,
            "peak_memory_bytes": peak_memory(arguments.device),
            "resumed": bool(checkpoint),
        },
        "evaluation": evaluation.evaluation,
        "gain": evaluation.gain,
        "forgetting": forgetting.metrics,
        "samples": evaluation.samples,
        "history": history,
    }
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None  # all ranks gather it
    return from_rank_zero(partial(_save, run, folder, model, state, metrics))


def _entries(parameter: Any) -> int:
    """Entries of a weight, which bitsandbytes packs into bytes, and which ZeRO-3 moves elsewhere."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel())


def _save(run: LoadedRun, folder: RunFolder, model: Any, state: Any, metrics: dict[str, Any]) -> dict[str, Any]:
    method = run.config.method
    with new_files(folder.adapter) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        run.tokenizer.save_pretrained(temporary)
        if method != "full":
            saved, base = PeftConfig.from_pretrained(str(temporary)), described_base(run.config.model.name)
            card = run_card(folder.path.resolve().name, saved, base, metrics)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    metrics["parameters"]["adapter_bytes"] = sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors"))
    title = f"{method} on {portable(run.title)}"
    draw_run(metrics["history"], metrics["evaluation"], folder.picture, method, title)
    if metrics["samples"]:
        write_whole(folder.samples, f"# {folder.path.resolve().name}\n\n{samples_text(metrics['samples'])}")
    with new_file(folder.trained) as file, file.open("wb") as stream:
        np.save(stream, run.trained_keys())
    folder.finish(metrics)
    logger.info("Finished: %s", folder.path)
    return metrics
