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
    """Find the learning rate with the lowest loss on validation rows; print the line for the config."""
    with reporting("smoa_lab.study"):
        from smoa_lab.config.run import load_config
        from smoa_lab.pages.tables import Table, number
        from smoa_lab.study.comparison import Comparison, Executor
        from smoa_lab.study.default_study import tuning_study
        from smoa_lab.study.plan import check_folder, prepare, study_file
        from smoa_lab.study.search import rate_text

        study, executor = tuning_study(load_config(config, overrides), max_runs), Executor()
        check_folder(study)
        with study_file(study):
            comparison = Comparison(study, prepare(study, executor.run_all))
        comparison.run(executor=executor)
        chosen = next(iter(comparison.chosen.values()))
        if json:
            losses = {rate_text(rate): loss for rate, loss in chosen.losses.items()}
            interior = chosen.place == "interior"
            print_json({"learning_rate": chosen.learning_rate, "interior": interior, "losses": losses})
            return
        rows = [
            [rate_text(rate), "diverged" if loss is None else number(loss, 4)] for rate, loss in chosen.losses.items()
        ]
        Table(["learning rate", "validation loss"], rows).print()
        if chosen.place == "edge":
            typer.echo("\nThe best lies at the edge of what was tried: start there and search again.")
        typer.echo(f"\nPut this under training:\n\n  learning_rate: {rate_text(chosen.learning_rate)}")
