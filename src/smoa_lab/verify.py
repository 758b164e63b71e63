"""Checks that a run's saved adapter, reloaded and merged, scores as it did when trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from smoa.errors import ConfigError, MergeError
from smoa_lab.config.methods import METHODS
from smoa_lab.config.run import RunConfig
from smoa_lab.models.base_models import load_base_model
from smoa_lab.training.loaded_run import LoadedRun
from smoa_lab.training.run_folder import RunFolder

# Relative differences of mean losses and of logits that float32 sums in another order explain.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Agreement:
    """Gold-answer losses of the adapter as trained, reloaded and merged, and the largest difference between a logit
    of the reloaded and of the merged model, relative to the largest logit."""

    trained: float
    reloaded: float
    merged: float
    logit_difference: float


def check_verifiable(config: RunConfig) -> None:
    """Raise ConfigError if :func:`verify_saved` will have nothing to compare: no adapter, or no questions."""
    if METHODS[config.method].config is None:
        raise ConfigError(
            f"method: {config.method} saves a whole model, and smoa demo reloads and merges an adapter; choose another "
            "method, or train by smoa train"
        )
    if config.questions.test_examples == 0:
        raise ConfigError(
            "data.test_examples: 0 holds no questions out, and smoa demo compares the saved adapter on them; give at "
            "least 1, or train by smoa train"
        )


def verify_saved(config: RunConfig, ready: LoadedRun, metrics: dict[str, Any]) -> Agreement:
    """Compare the finished run in ``config.folder`` with its own metrics.

    Raises:
        MergeError: reloaded or merged, the adapter is not the one that was trained, or training diverged.
    """
    trained = float(metrics["evaluation"]["after"]["all"]["gold_loss"])
    if not math.isfinite(trained):
        raise MergeError("training diverged: the loss is no number; lower training.learning_rate")
    base, _ = load_base_model(config.model)
    reloaded: Any = PeftModel.from_pretrained(base, str(RunFolder(config.folder).adapter))
    reloaded.eval()
    reloaded_loss, reloaded_logits = ready.held_out_losses(reloaded).mean, _logits(ready, reloaded)
    merged = reloaded.merge_and_unload(safe_merge=True)
    agreement = Agreement(
        trained=trained,
        reloaded=reloaded_loss,
        merged=ready.held_out_losses(merged).mean,
        logit_difference=float((_logits(ready, merged) - reloaded_logits).abs().max() / reloaded_logits.abs().max()),
    )
    _check(agreement, TOLERANCE[config.model.dtype])
    return agreement


def _check(agreement: Agreement, tolerance: float) -> None:
    losses = (agreement.trained, agreement.reloaded, agreement.merged)
    if max(losses) - min(losses) > tolerance * agreement.trained or agreement.logit_difference > tolerance:
        raise MergeError(f"the saved adapter disagrees with the trained one beyond {tolerance:g}: {agreement}")


def _logits(ready: LoadedRun, model: nn.Module, questions: int = 8) -> Tensor:
    """(questions, vocabulary): what the model would say first."""
    prompts = [ready.encoder.gold(row).prompt for row in ready.test_rows[:questions]]
    device = next(model.parameters()).device
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            inputs = torch.tensor([prompt], device=device)
            rows.append(model(input_ids=inputs).logits[0, -1].float())
    return torch.stack(rows)
