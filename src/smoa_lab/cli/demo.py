"""``smoa demo``: trains a small real model, then reloads and merges the adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import Overrides, TrustRemoteCode, reporting
from smoa_lab.cli.train import print_scores

if TYPE_CHECKING:
    from torch import Tensor

    from smoa_lab.config.run import RunConfig
    from smoa_lab.training.loaded_run import LoadedRun

CONFIG = Path(__file__).with_name("demo.yaml")
"""In a clone ``configs/demo.yaml`` is a link to it."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Relative differences of mean losses and of logits that float32 sums in another order explain."""


def demo(
    config: Annotated[
        Path, typer.Argument(help="YAML file of the run; by default the packaged demo.", show_default=False)
    ] = CONFIG,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a small real model in minutes, show what changed, reload the adapter and merge it."""
    with reporting("accelerate", *DRAWING):
        from smoa_lab.base_models import PACKAGED_MODELS, with_rate
        from smoa_lab.config.run import load_config
        from smoa_lab.training.loaded_run import load_run
        from smoa_lab.training.run_folder import RunFolder, in_free_folder
        from smoa_lab.training.train_run import train

        checked = in_free_folder(with_rate(load_config(config, overrides, trust_remote_code)))
        check_verifiable(checked)
        if checked.model.name in PACKAGED_MODELS:
            typer.echo(PACKAGED_MODELS[checked.model.name].notice)
        ready = load_run(checked)
        metrics = train(checked, ready)
        print_scores(metrics)
        typer.echo(verify_saved(checked, ready, metrics))
        folder = RunFolder(checked.folder)
        typer.echo(f"\nAdapter:    {folder.adapter}\nLoss curve: {folder.picture}\nMetrics:    {folder.metrics}")
        typer.echo(f"To train your own: copy {config}, edit the copy, and pass it to `smoa train`.")


def check_verifiable(config: RunConfig) -> None:
    """Raise ConfigError if :func:`verify_saved` will have nothing to compare: no adapter, or no questions."""
    from smoa.errors import ConfigError

    if config.method == "full":
        raise ConfigError(
            f"method: {config.method} saves a whole model, and smoa demo reloads and merges an adapter; choose another "
            "method, or train by smoa train"
        )
    if config.questions.test_examples == 0:
        raise ConfigError(
            "data.test_examples: 0 holds no questions out, and smoa demo compares the saved adapter on them; give at "
            "least 1, or train by smoa train"
        )


def verify_saved(config: RunConfig, run: LoadedRun, metrics: dict[str, Any]) -> str:
    """Compare the finished run in ``config.folder`` with its own metrics: the gold answers' losses as trained, reloaded
    and merged, and the first logits of some answers, relative to the largest, in a sentence.

    Raises:
        MergeError: reloaded or merged, the adapter is not the one that was trained, or training diverged.
    """
    import torch
    from peft import PeftModel

    from smoa.errors import MergeError
    from smoa_lab.base_models import load_base_model
    from smoa_lab.training.run_folder import RunFolder

    def first_logits(model: Any) -> Tensor:
        prompts = [run.encoder.gold(row).prompt for row in run.test_rows[:8]]
        inputs = [torch.tensor([prompt], device=model.device) for prompt in prompts]
        with torch.inference_mode():
            return torch.stack([model(input_ids=ids).logits[0, -1].float() for ids in inputs])

    trained = float(metrics["evaluation"]["after"]["all"]["gold_loss"])
    if not math.isfinite(trained):
        raise MergeError("training diverged: the loss is no number; lower training.learning_rate")
    model: Any = PeftModel.from_pretrained(load_base_model(config.model)[0], str(RunFolder(config.folder).adapter))
    reloaded, logits = run.held_out_losses(model.eval()).mean, first_logits(model)
    model = model.merge_and_unload(safe_merge=True)
    merged = run.held_out_losses(model).mean
    difference = float((first_logits(model) - logits).abs().max() / logits.abs().max())
    sentence = (
        f"Gold-answer loss of the adapter as trained {trained:.6f}, reloaded onto a fresh base model {reloaded:.6f}, "
        f"merged {merged:.6f}: they {{}} (largest difference of a logit, relative: {difference:.1e})."
    )
    tolerance, losses = TOLERANCE[config.model.dtype], (trained, reloaded, merged)
    if max(losses) - min(losses) > tolerance * trained or difference > tolerance:
        raise MergeError(f"the saved adapter is not the one that was trained. {sentence.format('disagree')}")
    return sentence.format("agree")
