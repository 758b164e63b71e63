"""``smoa tune``: finds the learning rate for a run's config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoa_lab.cli.console import AsJson, Overrides, TrustRemoteCode, print_json, reporting


def tune(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, as for `smoa train`.")],
    overrides: Overrides = None,
    max_runs: Annotated[int, typer.Option("--max-runs", min=3, help="Rates to try at most.")] = 6,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Find the learning rate with the lowest loss on validation questions or rows; print the line for the config."""
    with reporting():
        from smoa_lab.config.run import load_config
        from smoa_lab.pages.tables import Table
        from smoa_lab.study.tune_run import tune_run

        search = tune_run(load_config(config, overrides), max_runs)
        if json:
            losses = {f"{rate:g}": loss for rate, loss in search.losses.items()}
            print_json({"learning_rate": search.learning_rate, "interior": search.interior, "losses": losses})
            return
        rows = [[f"{rate:g}", "diverged" if loss is None else f"{loss:.4f}"] for rate, loss in search.losses.items()]
        Table(["learning rate", "validation loss"], rows).print()
        if not search.interior:
            typer.echo("\nThe best lies at the edge of what was tried: start there and search again.")
        typer.echo(f"\nPut this under training:\n\n  learning_rate: {search.learning_rate:g}")
