"""``smoa demo``: trains a small real model, then reloads and merges the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import Overrides, TrustRemoteCode, reporting
from smoa_lab.cli.train import print_scores

CONFIG = Path(__file__).with_name("demo.yaml")
"""In a clone ``configs/demo.yaml`` is a link to it."""


def demo(
    config: Annotated[
        Path, typer.Argument(help="YAML file of the run; by default the packaged demo.", show_default=False)
    ] = CONFIG,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a small real model in minutes, show what changed, reload the adapter and merge it."""
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab.base_models import PACKAGED_MODELS
        from smoa_lab.config.run import load_config
        from smoa_lab.training.run import run
        from smoa_lab.training.run_folder import RunFolder, in_free_folder
        from smoa_lab.verify import verify

        checked = in_free_folder(load_config(config, overrides))
        if checked.method == "full":
            raise ConfigError(
                f"method: {checked.method} saves a whole model, and smoa demo reloads and merges an adapter; choose "
                "another method, or train by smoa train"
            )
        if checked.model.name in PACKAGED_MODELS:
            typer.echo(PACKAGED_MODELS[checked.model.name].notice)
        print_scores(run(checked))
        folder = RunFolder(checked.folder)
        typer.echo("\nThe saved adapter, loaded again:")
        verdicts = verify(folder.path, ["merged"])
        typer.echo("\n".join(verdict.line() for verdict in verdicts))
        typer.echo(f"\nAdapter:    {folder.adapter}\nLoss curve: {folder.picture}\nMetrics:    {folder.metrics}")
        typer.echo(f"To train your own: copy {config}, edit the copy, and pass it to `smoa train`.")
        if not all(verdict.agrees for verdict in verdicts):
            raise typer.Exit(1)
