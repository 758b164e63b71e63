"""``smoa train``: trains an adapter from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.basics.extras import DRAWING
from smoa_lab.cli.console import AsJson, Overrides, TrustRemoteCode, print_json, reporting, score
from smoa_lab.pages.tables import Table


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; configs/ has ready ones.")],
    overrides: Overrides = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write the run's page, report.html, as smoa report does.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Train an adapter on questions or on your own rows, and score it on held-out ones."""
    with reporting("accelerate", *DRAWING):
        from smoa_lab.config.run import load_config
        from smoa_lab.training.run_folder import is_first_process
        from smoa_lab.training.train_run import train as train_run

        checked = load_config(config, overrides, trust_remote_code)
        metrics = train_run(checked)
        if not is_first_process():
            return
        if report:
            from smoa_lab.report import report_run

            typer.echo(f"Page: {report_run(checked.folder)[0]}", err=True)
        if json:
            print_json(metrics)
            return
        print_scores(metrics)
        typer.echo(f"\nAdapter, metrics, log and loss curve: {checked.folder}")


def print_scores(metrics: dict[str, Any]) -> None:
    """Held-out scores before and after training, and the adapter's size."""
    from rich.filesize import decimal

    evaluation = metrics["evaluation"]
    stages = [stage for stage in ("before", "after") if stage in evaluation]
    if stages and "rows" in evaluation[stages[-1]]["all"]:
        _print_rows(metrics, stages)
    else:
        _print_questions(metrics, stages)
    _print_balance(metrics, stages)
    parameters, training = metrics["parameters"], metrics["training"]
    speed = f", {training['tokens_per_second']:,.0f} tokens a second" if "tokens_per_second" in training else ""
    typer.echo(
        f"\n{parameters['trainable']:,} trainable parameters, {parameters['percent']} % of {parameters['total']:,}; "
        f"{decimal(parameters['adapter_bytes'])} on disk; {training['steps']} steps of {training['trainer']} in "
        f"{training['seconds']:.0f} s{speed}; at most {decimal(training['peak_memory_bytes'])} of memory"
    )


def _print_balance(metrics: dict[str, Any], stages: list[str]) -> None:
    """What was learned and what was forgotten, in one line."""
    learned, forgot = [], metrics["forgetting"]
    for name in metrics["evaluation"][stages[-1]] if len(stages) == 2 else ():
        before, after = (metrics["evaluation"][stage][name] for stage in stages)
        if "rows" in after:
            learned = [f"perplexity {before['perplexity']:.2f} → {after['perplexity']:.2f}"]
        elif name != "all":
            learned.append(f"{name} {100 * before['accuracy']:.1f} → {100 * after['accuracy']:.1f} %")
    parts = [f"learned: {', '.join(learned)}"] if learned else []
    if forgot:
        parts.append(f"forgot: {forgot['change']:+.3f} ± {forgot['stderr']:.3f} nats per token of general text")
    if parts:
        typer.echo("\n" + "   ".join(parts))


def _print_questions(metrics: dict[str, Any], stages: list[str]) -> None:
    evaluation = metrics["evaluation"]
    rows = [
        [
            name,
            stage,
            scores["questions"],
            score(scores["gold_loss"], scores["gold_loss_stderr"]),
            score(scores["accuracy"], scores["accuracy_stderr"]),
            score(scores["accuracy_norm"], scores["accuracy_norm_stderr"]),
            score(scores["majority"]),
        ]
        for name in (evaluation[stages[-1]] if stages else ())
        for stage in stages
        for scores in [evaluation[stage][name]]
    ]
    if rows:
        header = ["held-out questions", "", "number", "gold-answer loss", "accuracy", "per character", "majority"]
        Table(header, rows).print()
    if metrics["gain"]:
        points, stderr = (100 * metrics["gain"][key] for key in ("accuracy", "accuracy_stderr"))
        typer.echo(f"\nAccuracy rose by {points:.1f} ± {stderr:.1f} points (standard error, paired by question).")
    for sample in metrics["samples"]:
        typer.echo(f"\n{sample['question']}")
        for name in ("before", "after", "reference"):
            if name in sample:
                typer.echo(f"  {name + ':':10} {sample[name] or '(nothing)'}")


def _print_rows(metrics: dict[str, Any], stages: list[str]) -> None:
    rows = [
        [stage, rows["rows"], rows["tokens"], score(rows["loss"], rows["loss_stderr"]), f"{rows['perplexity']:.2f}"]
        for stage in stages
        for rows in [metrics["evaluation"][stage]["all"]]
    ]
    Table(["held-out rows", "number", "trained tokens", "loss", "perplexity"], rows).print()
    gain = metrics["gain"]
    typer.echo(
        f"\nThe loss changed by {gain['loss']:+.3f} ± {gain['loss_stderr']:.3f} (standard error, paired by row)."
    )
    if "preferred" in gain:
        typer.echo(
            f"The chosen answer gained on the rejected one in {100 * gain['preferred']:.0f} % of the held-out rows."
        )
    typer.echo(f"Answers before and after: samples.md, {len(metrics['samples'])} held-out prompts.")
