"""Trains an adapter as a run's config says, scores it, and saves everything in the run's folder."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainingArguments

from smoa.distributed import from_rank_zero
from smoa.errors import ConfigError
from smoa_lab.base_models import described_base, empty_model, to_device, with_rate
from smoa_lab.basics.files import new_file, new_folder, write_whole
from smoa_lab.basics.values import finite, portable
from smoa_lab.config.methods import check_adapter, moves_base
from smoa_lab.config.run import RunConfig
from smoa_lab.data.answers import ANSWERED
from smoa_lab.data.row import row_from_json
from smoa_lab.pages.card import run_card, samples_text
from smoa_lab.pages.charts import losses, save_picture
from smoa_lab.scoring.evaluation import Evaluation, Forgetting
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.run_folder import RunFolder, is_first_process, peak_memory, provenance, reset_peak_memory
from smoa_lab.training.trainer import Diverged, Stopwatch, fit, make_trainer

logger = logging.getLogger(__name__)


def run(config: RunConfig, may_diverge: bool = False) -> dict[str, Any]:
    """Train, score, save; the run's metrics, as ``metrics.json`` has them, which has null for what is not finite.

    A run that diverges raises :class:`Diverged` and can be started again, at another rate too; if it ``may_diverge`` it
    is finished, without an adapter. Nothing is written before config, rows and model are known to be good, and TRL's
    trainer is made of them.
    """
    config = with_rate(config)
    folder, text, peft_config = RunFolder(config.folder), config.to_yaml(), config.peft_config()
    folder.check(text)
    if peft_config is not None:
        check_adapter(empty_model(config.model), peft_config)
    reset_peak_memory()
    loaded = load_run(config)
    forgetting = Forgetting(config.forgetting.text, config.forgetting.tokens, loaded.tokenizer, loaded.base.config)
    trainer = make_trainer(loaded, peft_config)
    if config.data.metric in ANSWERED and trainer.args.world_size > 1:
        raise ConfigError(f"data.metric: {config.data.metric} needs answers, which one process writes; leave it out")
    with folder.claimed(text, loaded.digests if is_first_process() else {}) as checkpoint:
        return _train(loaded, trainer, forgetting, folder, checkpoint, may_diverge)


def score_untouched(config: RunConfig) -> dict[str, Any]:
    """Score the base model, into the run's folder, without any training."""
    folder, text = RunFolder(config.folder), config.to_yaml()
    folder.check(text)
    loaded, arguments = load_run(config), config.arguments()
    with folder.claimed(text, loaded.digests):
        if not arguments.use_cpu:
            to_device(loaded.base)
        loaded.base.requires_grad_(False)
        evaluation, _ = loaded.evaluation()
        started = time.perf_counter()
        evaluation.measure(loaded.base, "before")
        metrics = _metrics(loaded, arguments, loaded.base, evaluation)
        seconds = round(time.perf_counter() - started, 1)
        metrics["training"] = {"trainer": None, "seconds": seconds, "steps": 0, "resumed": False}
        return _finish(folder, metrics, evaluation)


def time_steps(config: RunConfig, most: int, seconds: float) -> float:
    """The mean seconds of a run's first steps, which are thrown away: of at most so many steps, or so many seconds. The
    first step, which is slower, does not count."""
    trainer, watch = make_trainer(load_run(config), config.peft_config()), Stopwatch(most, seconds)
    trainer.add_callback(watch)
    with suppress(Diverged):
        trainer.train()
    return (watch.ends[-1] - watch.ends[0]) / max(1, len(watch.ends) - 1)


def _train(
    loaded: LoadedRun,
    trainer: Trainer,
    forgetting: Forgetting,
    folder: RunFolder,
    checkpoint: str | None,
    may_diverge: bool,
) -> dict[str, Any]:
    arguments: Any = trainer.args
    if arguments.process_index > 0:
        logging.getLogger("smoa_lab").setLevel(logging.WARNING)  # rank 0 logs the rest
    evaluation, _ = loaded.evaluation(answers=arguments.world_size == 1)
    if not evaluation.rows:
        logger.info("No rows are held out, so none are scored")
    with _untouched(trainer.model):
        if loaded.config.scoring.before:
            evaluation.measure(trainer.model, "before")
        forgetting.measure(trainer.model, "before")
    logger.info("Training on %s by %s", loaded.config.data.source, type(trainer).__name__)
    started = time.perf_counter()
    model: Any = trainer.model
    diverged: Diverged | None = None
    try:
        fit(trainer, checkpoint)
    except Diverged as error:
        folder.remove_checkpoints()  # a resumed run would come to the same steps
        if not may_diverge:
            raise
        diverged = error
    seconds = time.perf_counter() - started
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # scored as it is loaded: without autocast
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if diverged is None:
        evaluation.measure(model, "after")
        forgetting.measure(model, "after")
    else:
        evaluation.diverge()
    metrics = _metrics(loaded, arguments, model, evaluation, forgetting)
    metrics["training"] = {
        "trainer": type(trainer).__name__.removeprefix("Sparse"),
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "best_step": None if diverged else _best_step(trainer),
        "processes": arguments.world_size,
        "peak_memory": peak_memory(arguments.device),
        "resumed": bool(checkpoint),
    }
    metrics["history"] = trainer.state.log_history
    if diverged is not None:
        logger.warning(diverged)
        return _finish(folder, metrics, evaluation)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None  # all ranks gather it
    saved: dict[str, Any] = from_rank_zero(partial(_save, loaded, folder, model, state, metrics, evaluation))
    return saved


def _untouched(model: Any) -> Any:
    """Within it a model before its training is its base, also where the method starts with another update than zero.
    With what was moved from the base into the adapter it adds up to the base."""
    config = getattr(model, "active_peft_config", None)
    return nullcontext() if config is None or moves_base(config) else model.disable_adapter()


def _metrics(
    loaded: LoadedRun,
    arguments: TrainingArguments,
    model: Any,
    evaluation: Evaluation,
    forgetting: Forgetting | None = None,
) -> dict[str, Any]:
    """What is known of a model, its training aside."""
    trainable, total = PeftModel.get_nb_trainable_parameters(model)  # which reads its tensors, of any model
    account = loaded.data.account
    faults = [fault.partition(", row ") for fault in account["faults"]]  # where the row is, and what is wrong with it
    return {
        "config": portable(loaded.config.model_dump(mode="json")),
        "provenance": provenance(arguments.seed, arguments.device),
        "digests": loaded.digests,
        "parameters": {"trainable": trainable, "total": total, "percent": round(100 * trainable / total, 4)},
        "data": {
            "source": loaded.config.data.source,
            **account,
            "faults": [portable(place) + row + problem for place, row, problem in faults],
        },
        "evaluation": evaluation.scores(),
        "gain": evaluation.gain,
        "forgetting": forgetting and forgetting.metrics,
        "samples": evaluation.samples,
        "training": None,
        "history": [],
    }


def _best_step(trainer: Trainer) -> int | None:
    """The earlier step whose adapter is the one at the end, since it was the best; None where that is the last."""
    state = trainer.state
    is_loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if is_loaded and state.best_global_step != state.global_step else None


def _save(
    loaded: LoadedRun, folder: RunFolder, model: Any, state: Any, metrics: dict[str, Any], evaluation: Evaluation
) -> dict[str, Any]:
    method = loaded.config.method
    shutil.rmtree(folder.adapter, ignore_errors=True)  # of a run that was killed before it was finished
    with new_folder(folder.adapter) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        loaded.tokenizer.save_pretrained(temporary)
        if method != "full":
            saved, base = PeftConfig.from_pretrained(str(temporary)), described_base(loaded.config.model.name)
            if base.packaged:  # and not a folder of this machine's, nor the Hub's base
                saved.base_model_name_or_path = base.packaged
                saved.save_pretrained(str(temporary))
            card = run_card(folder.path.resolve().name, saved, base, metrics)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    metrics["parameters"]["adapter_bytes"] = sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors"))
    if (chart := losses(metrics["history"], metrics["evaluation"], method, metrics["training"])) is not None:
        save_picture(chart.properties(title=f"{method} on {loaded.config.data.source}"), folder.picture)
    if metrics["samples"]:
        write_whole(folder.samples, f"# {folder.path.resolve().name}\n\n{samples_text(metrics['samples'])}")
    trained = loaded.data.part("train").select_columns("row")
    with new_file(folder.trained) as file, file.open("wb") as stream:
        np.save(stream, np.unique(np.fromiter((row_from_json(row["row"]).key for row in trained), np.uint64)))
    return _finish(folder, metrics, evaluation)


def _finish(folder: RunFolder, metrics: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Write a JSON line for each held-out row, and last the metrics, with null for what is not finite."""
    folder.write_rows(evaluation.lines())
    metrics = finite(metrics)
    folder.finish(metrics)
    logger.info("Finished: %s", folder.path)
    return metrics
