"""``smoa train``: trains an adapter, from a YAML file or for a model and data."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import AsJson, Overrides, TrustRemoteCode, print_json, reporting
from smoa_lab.pages.tables import score_table, time_text


def train(
    config: Annotated[
        str | None, typer.Argument(help="YAML file of the run; configs/ has ready ones. Or give --model and --data.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Without a file: model.name, a Hub id, folder, or gemma3-270m, smollm2-135m.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Without a file: data.train, rows in a file, a folder or a data set of the Hub; or csqa, …"),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write the run's page, report.html, as smoa report does.")
    ] = False,
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
        if report:
            from smoa_lab.report import report_run

            typer.echo(f"Page: {report_run(checked.folder)}", err=True)
        if json:
            print_json(metrics)
            return
        print_scores(metrics)
        typer.echo(f"\nAdapter, metrics, log and loss curve: {checked.folder}")


def print_scores(metrics: dict[str, Any]) -> None:
    """Held-out scores before and after training, what was learned and forgotten, and the adapter's size."""
    from rich.filesize import decimal

    evaluation, gain, forgot, samples = (metrics[key] for key in ("evaluation", "gain", "forgetting", "samples"))
    if evaluation:
        score_table(evaluation).print()
    if gain:
        change = f"{gain['loss']:+.3f} ± {gain['loss_stderr']:.3f}"
        typer.echo(f"\nThe loss changed by {change} (standard error, paired by row).")
    if gain and "accuracy" in gain:
        points, stderr = 100 * gain["accuracy"], 100 * gain["accuracy_stderr"]
        typer.echo(f"Accuracy changed by {points:+.1f} ± {stderr:.1f} points.")
    if "won" in evaluation.get("after", {}):
        share = f"{100 * evaluation['after']['won']:.0f} %"
        typer.echo(f"The chosen answer gained on the rejected one in {share} of the held-out rows.")
    if samples:
        typer.echo(f"Answers before and after: samples.md, {len(samples)} held-out prompts.")
    parts = []
    if len(evaluation) == 2:
        before, after = evaluation["before"], evaluation["after"]
        learned = f"perplexity {before['perplexity']:.2f} → {after['perplexity']:.2f}"
        if "accuracy" in after:
            learned = f"accuracy {100 * before['accuracy']:.1f} → {100 * after['accuracy']:.1f} %"
        parts = [f"learned: {learned}"]
    if forgot:
        parts.append(f"forgot: {forgot['change']:+.3f} ± {forgot['stderr']:.3f} nats per token of general text")
    if parts:
        typer.echo("\n" + "   ".join(parts))
    parameters, training = metrics["parameters"], metrics["training"]
    speed = f", {training['tokens_per_second']:,.0f} tokens a second" if "tokens_per_second" in training else ""
    typer.echo(
        f"\n{parameters['trainable']:,} trainable parameters, {parameters['percent']} % of {parameters['total']:,}; "
        f"{decimal(parameters['adapter_bytes'])} on disk; {training['steps']} steps of {training['trainer']}"
        f"{time_text(training)}{speed}; at most {decimal(training['peak_memory_bytes'])} of memory"
    )
