"""``smoa demo``: trains a small real model, then reloads and merges the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import Overrides, TrustRemoteCode, reporting
from smoa_lab.cli.train import print_scores

CONFIG = Path(__file__).with_name("demo.yaml")
"""In a clone ``configs/demo.yaml`` is a link to it."""


def demo(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; else smoa's own.", show_default=False)] = CONFIG,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a small real model in minutes, show what changed, reload the adapter and merge it."""
    with reporting("accelerate", *DRAWING):
        from smoa_lab.config.run import load_config
        from smoa_lab.models.base_models import with_rate
        from smoa_lab.models.packaged_models import PACKAGED_MODELS
        from smoa_lab.training.loaded_run import load_run
        from smoa_lab.training.run_folder import RunFolder, in_free_folder
        from smoa_lab.training.train_run import train
        from smoa_lab.verify import check_verifiable, verify_saved

        checked = in_free_folder(with_rate(load_config(config, overrides, trust_remote_code)))
        check_verifiable(checked)
        if checked.model.name in PACKAGED_MODELS:
            typer.echo(PACKAGED_MODELS[checked.model.name].notice)
        ready = load_run(checked)
        metrics = train(checked, ready)
        print_scores(metrics)
        agreement = verify_saved(checked, ready, metrics)
        typer.echo(
            f"Gold-answer loss of the adapter as trained {agreement.trained:.6f}, reloaded onto a fresh base model "
            f"{agreement.reloaded:.6f}, merged {agreement.merged:.6f}: they agree "
            f"(largest difference of a logit, relative: {agreement.logit_difference:.1e})."
        )
        folder = RunFolder(checked.folder)
        typer.echo(f"\nAdapter:    {folder.adapter}\nLoss curve: {folder.picture}\nMetrics:    {folder.metrics}")
        typer.echo(f"To train your own: copy {config}, edit the copy, and pass it to `smoa train`.")
