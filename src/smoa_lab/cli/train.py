"""``smoa train``: trains an adapter, from a YAML file or for a model and data."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import AsJson, Data, Model, Overrides, TrustRemoteCode, print_json, reporting
from smoa_lab.pages.tables import outcome, score_table, time_text


def train(
    config: Annotated[
        str | None, typer.Argument(help="YAML file of the run; configs/ has ready ones. Or give --model and --data.")
    ] = None,
    overrides: Overrides = None,
    model: Model = None,
    data: Data = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Train an adapter on rows, and score it on held-out ones.

    With --model and --data it needs no file: it trains what `smoa init` would write for them.
    """
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab.config.run import load_config
        from smoa_lab.training.run import run
        from smoa_lab.training.run_folder import is_first_process

        if model is None and data is None and config is not None:
            checked = load_config(config, overrides)
        elif model is None or data is None or (config is not None and "=" not in config):
            raise ConfigError("give the YAML file of a run, which names model and data, or both --model and --data")
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--model and --data are for one process; write a file by `smoa init`, and train from it")
        else:
            from smoa_lab.init import default_run

            words = [*([] if config is None else [config]), *(overrides or [])]
            checked = default_run(model, data, words)
            typer.echo(f"Run folder: {checked.folder}", err=True)
        metrics = run(checked)
        if not is_first_process():
            return
        if json:
            print_json(metrics)
            return
        print_scores(metrics)
        typer.echo(f"\nAdapter, metrics, log and loss curve: {checked.folder}")


def print_scores(metrics: dict[str, Any]) -> None:
    """Held-out scores before and after training, what was learned and forgotten, and the adapter's size."""
    from rich.filesize import decimal

    if metrics["evaluation"]:
        score_table(metrics["evaluation"]).print()
        typer.echo()
    for line in outcome(metrics):
        typer.echo(line)
    if metrics["samples"]:
        typer.echo(f"Answers before and after: samples.md, {len(metrics['samples'])} held-out prompts.")
    parameters, training = metrics["parameters"], metrics["training"]
    speed = f", {training['tokens_per_second']:,.0f} tokens a second" if "tokens_per_second" in training else ""
    typer.echo(
        f"\n{parameters['trainable']:,} trainable parameters, {parameters['percent']} % of {parameters['total']:,}; "
        f"{decimal(parameters['adapter_bytes'])} on disk; {training['steps']} steps of {training['trainer']}"
        f"{time_text(training)}{speed}; at most {decimal(training['peak_memory_bytes'])} of memory"
    )
