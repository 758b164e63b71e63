"""Trains an adapter as a run's config says, on transformers' Trainer, and saves everything in the run's folder."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from smoa.atomic import replaced_folder
from smoa.errors import ConfigError
from smoa.layers.distributed import from_rank_zero, is_distributed
from smoa_lab.basics.extras import require
from smoa_lab.basics.portable import portable
from smoa_lab.config.methods import METHODS
from smoa_lab.config.run_config import RunConfig
from smoa_lab.data.prompts import Encoded, PromptEncoder
from smoa_lab.data.selection import Selection
from smoa_lab.drawing.plots import draw_run
from smoa_lab.scoring.answer_loss import AnswerTrainer, collate
from smoa_lab.training.base_models import load_base_model
from smoa_lab.training.needs import input_needs, training_needs
from smoa_lab.training.packaged_models import described_base
from smoa_lab.training.progress import REPLACED, ProgressReport
from smoa_lab.training.run_card import run_card
from smoa_lab.training.run_folder import RunFolder, provenance
from smoa_lab.training.stages import Stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first step."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    records: Selection


def prepare(config: RunConfig, records: Selection | None = None) -> Prepared:
    """Load data, unless given, and model; what cannot be loaded fails here, before any work."""
    require(input_needs(config))
    records = config.data.select() if records is None else records
    base, tokenizer = load_base_model(config.model)
    encoder = PromptEncoder(tokenizer, config.task.template, config.task.answer, config.task.max_length)
    return Prepared(base, tokenizer, encoder, records)


def train(config: RunConfig, prepared: Prepared | None = None) -> dict[str, Any]:
    """Train, evaluate, save; the run's metrics, as ``metrics.json`` has them.

    Raises:
        ConfigError: the run's folder contains a finished run or one of another config.
        DataError: model or data cannot be loaded, or a package is missing.
    """
    require(training_needs(config))
    folder = RunFolder(config.folder)
    checkpoint = folder.start(config.to_yaml())
    with folder.logging():
        if checkpoint:
            logger.info("Resuming from %s", checkpoint)
        return _run(config, folder, prepared or prepare(config), checkpoint)


def _run(config: RunConfig, folder: RunFolder, ready: Prepared, checkpoint: str | None) -> dict[str, Any]:
    arguments = training_arguments(config)
    if arguments.process_index > 0:
        logging.getLogger("smoa_lab").setLevel(logging.WARNING)  # rank 0 logs the rest
    stages = Stages(ready.encoder, ready.records.test, config.task, alone=arguments.world_size == 1)
    if config.task.baseline:
        stages.look(ready.base, "before")
    examples = [ready.encoder.example(record) for record in ready.records.train]
    model, trainer, seconds = fit(config, arguments, ready, examples, checkpoint)
    stages.look(model, "after")
    metrics = {
        "format": 1,
        "config": portable(config.model_dump(mode="json")),
        "provenance": provenance(arguments.seed, arguments.device),
        "parameters": _parameters(model),
        "data": portable(ready.records.account) | {"truncation": _truncation(examples)},
        "training": {
            "seconds": round(seconds, 1),
            "steps": trainer.state.global_step,
            "processes": arguments.world_size,
            "resumed": bool(checkpoint),
        },
        "evaluation": stages.evaluation,
        "gain": stages.gain,
        "samples": stages.samples,
        "history": trainer.state.log_history,
    }
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None  # all ranks gather it
    return from_rank_zero(partial(_save, config, folder, ready, model, state, metrics))


def fit(
    config: RunConfig, arguments: TrainingArguments, ready: Prepared, examples: list[Encoded], checkpoint: str | None
) -> tuple[Any, AnswerTrainer, float]:
    """The trained model, its trainer, and the seconds that training took."""
    set_seed(arguments.seed)  # the adapter's factors are drawn here
    peft_config = METHODS[config.method].peft_config(config.adapter)
    model: Any = ready.base if peft_config is None else get_peft_model(ready.base, peft_config)
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=[example.row for example in examples],
        eval_dataset=[ready.encoder.example(record).row for record in ready.records.validation] or None,
        data_collator=partial(collate, pad=ready.encoder.pad),
        processing_class=ready.tokenizer,
        callbacks=[ProgressReport()],
    )
    for callback in REPLACED:
        trainer.remove_callback(callback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, trainer, time.perf_counter() - started


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The Trainer's arguments of a run.

    Raises:
        ConfigError: accelerate counts fewer processes than there are.
    """
    arguments = TrainingArguments(**config.training)
    if is_distributed() and arguments.world_size < dist.get_world_size():
        raise ConfigError(
            f"training.deepspeed: accelerate counts {arguments.world_size} of {dist.get_world_size()} processes, as it "
            "does for DeepSpeed without a GPU, and all would train on the same data; leave deepspeed out, or use GPUs"
        )
    # Pinned memory speeds up copies to a GPU; without one torch only warns.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    return arguments


def _parameters(model: nn.Module) -> dict[str, Any]:
    trainable = sum(_entries(parameter) for parameter in model.parameters() if parameter.requires_grad)
    total = sum(map(_entries, model.parameters()))
    return {"trainable": trainable, "total": total, "percent": round(100 * trainable / total, 4)}


def _entries(parameter: Any) -> int:
    """Entries of a weight, which bitsandbytes packs into bytes, and which ZeRO-3 moves elsewhere."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel())


def _truncation(examples: list[Encoded]) -> dict[str, int]:
    return {
        "prompts_cut": sum(example.cut > 0 for example in examples),
        "prompt_tokens_cut": sum(example.cut for example in examples),
        "answers_cut": sum(example.answer_cut > 0 for example in examples),
    }


def _save(
    config: RunConfig, folder: RunFolder, ready: Prepared, model: Any, state: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    with replaced_folder(folder.adapter) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        ready.tokenizer.save_pretrained(temporary)
        if METHODS[config.method].config is not None:  # else it is a whole model
            saved, base = PeftConfig.from_pretrained(str(temporary)), described_base(config.model.name)
            card = run_card(folder.path.resolve().name, saved, base, metrics)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    metrics["parameters"]["adapter_bytes"] = sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors"))
    title = f"{config.method} on {', '.join(config.data.tasks)}"
    draw_run(metrics["history"], metrics["evaluation"], folder.picture, title)
    folder.finish(metrics)
    logger.info("Finished: %s", folder.path)
    return metrics
