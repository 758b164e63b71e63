"""The commands of a run: ``smoa init``, which writes its YAML file, ``smoa data check``, which shows what would be
trained, ``smoa train`` and ``smoa eval``."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import (
    AsJson,
    Base,
    BaseDtype,
    Data,
    Metric,
    Model,
    Overrides,
    Trusted,
    overridden,
    print_json,
    reporting,
    show,
)

DEFAULT = "smollm2-135m"
data_app = typer.Typer(help="Look at your own rows before a run.", no_args_is_help=True)


def init(
    model: Annotated[
        str, typer.Option(prompt="Model (Hub id, folder, or smollm2-135m)", help="The file's model.name.")
    ],
    data: Annotated[str, typer.Option(prompt="Data (file, folder, or data set's name)", help="The file's data.train.")],
    config: Annotated[Path | None, typer.Argument(help="YAML file to write; NAME.yaml for data called NAME.")] = None,
    parameters: Annotated[str, typer.Option(help="How many to train: a number, a share, or lora:8.")] = "lora:8",
    dtype: BaseDtype = None,
    json: AsJson = False,
) -> None:
    """Write a commented config for your model and data; ask for them if they are not given."""
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab import init
        from smoa_lab.basics.files import check_new, write_whole

        file = config or init.file_for(data)
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{file}: the name of a config ends in .yaml; write {file}.yaml")
        check_new(file)
        values = init.first_values(model, data, parameters, dtype)
        values["training"]["output_dir"] = f"runs/{file.stem}"
        write_whole(file, init.config_text(file, values))
        show(
            f"{file}: written\nTrain: smoa train {quote(file.as_posix())}", {"file": str(file), "config": values}, json
        )


def train(
    config: Annotated[str | None, typer.Argument(help="YAML file of the run. Or give --model and --data.")] = None,
    overrides: Overrides = None,
    model: Model = None,
    data: Data = None,
    metric: Metric = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Train an adapter on rows, and score it on held-out ones.

    With --model and --data it needs no file: it trains what `smoa init` would write for them.
    """
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab.config.run import load_config
        from smoa_lab.training.run_folder import is_first_process
        from smoa_lab.training.train import run

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

    from smoa_lab.pages.tables import metric_table, outcome, steps_text

    if metrics["evaluation"]:
        metric_table(metrics["evaluation"]).print()
        typer.echo()
    for line in outcome(metrics):
        typer.echo(line)
    if metrics["samples"]:
        typer.echo(f"Answers before and after: samples.md, {len(metrics['samples'])} held-out prompts.")
    parameters, training = metrics["parameters"], metrics["training"]
    typer.echo(
        f"\n{parameters['trainable']:,} trainable parameters, {parameters['percent']} % of {parameters['total']:,}; "
        f"{decimal(parameters['adapter_bytes'])} on disk; {training['trainer']}: "
        f"{steps_text(training)}; at most {decimal(training['peak_memory'])} of memory"
    )


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a config file for the base model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values to change, e.g. data.test=new.jsonl.", callback=lambda given: overridden(given)),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Another adapter of the run's base, such as its LoRA.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    metric: Metric = None,
    base: Base = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Score a run's adapter, or a base model, on held-out rows."""
    with reporting():
        from smoa_lab.basics.files import check_new, write_whole
        from smoa_lab.basics.values import json_text
        from smoa_lab.evaluate import evaluate_run
        from smoa_lab.open_run import open_place
        from smoa_lab.pages.tables import metric_table

        if output is not None:
            check_new(output)
        opened = open_place(run, base, overrides or [])
        result = evaluate_run(opened, adapter)
        if json:
            print_json(result)
        else:
            typer.echo(result["adapter"] or result["config"]["model"]["name"])
            stages = {"before": result["before"], "after": result["scores"]}
            metric_table({stage: scores for stage, scores in stages.items() if scores}).print()
        if output is not None:  # last: whatever happens to the file, the scores are printed
            write_whole(output, json_text(result) + "\n")


@data_app.command(epilog="Example: smoa data check chats.jsonl --model smollm2-135m --examples 10")
def check(
    place: Annotated[str, typer.Argument(help="Rows: a file, a folder or a data set's name; or a run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. data.template=alpaca.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model, or folder of a tokenizer; by default smollm2-135m, if it is here.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Show what would be trained on: formats, lengths, what is cut or dropped, bad rows, and examples.

    Exit code 1: there are bad rows, which aren't to be skipped, none to train on, or rows that the run can't have.
    """
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab.base_models import RunModel, is_here
        from smoa_lab.config.run import check_config, load_config
        from smoa_lab.config.yaml_text import apply_overrides
        from smoa_lab.training.loaded_run import read_rows_of, trainable_rows_of

        words = [*([] if model is None else [f"model.name={model}"]), *(overrides or [])]
        if is_file := place.endswith((".yaml", ".yml")):
            config = load_config(place, words)
        else:
            if model is None and not is_here(DEFAULT):
                raise ConfigError("give --model, a model or a tokenizer's folder: nothing is downloaded unasked")
            values: dict[str, Any] = {"model": {"name": DEFAULT}, "data": {"train": place}, "training": {}}
            apply_overrides(values, words)
            config = check_config(values, place)
        tokenizer = RunModel.of(config).tokenizer
        _, rows = read_rows_of(config, tokenizer)
        account, trained = rows.account, rows.account["parts"].get("train", 0)
        if json:
            print_json(account)
        else:
            _print_account(place, config.model.name, account)
            for number, row in enumerate(islice(rows.part("train"), examples), start=1):
                _print_example(f"example {number} of {min(examples, trained)}", row, tokenizer)
        if not trained or (account["bad"] and not config.data.skip_bad_rows):
            raise typer.Exit(1)
        if is_file:
            trainable_rows_of(config, tokenizer)


def _print_account(place: str, model: str, account: dict[str, Any]) -> None:
    tokens, parts = account["tokens"], account["parts"]
    counts = ", ".join(f"{number:,} {part}" for part, number in parts.items()) or "none that can be trained on"
    typer.echo(f"{place}: {account['format'] or 'no format recognized'}; rows: {counts}")
    if tokens["total"]:
        typer.echo(
            f"{tokens['total']:,} tokens of {model}, {account['trained_tokens']:,} of them trained; a row has "
            f"{tokens['shortest']:,} to {tokens['longest']:,}, half of them at most {tokens['median']:,}"
        )
    typer.echo(f"{account['cut']:,} rows are cut at {account['max_length']} tokens")
    typer.echo(f"{account['dropped']:,} rows are dropped: nothing that is trained is left in them")
    typer.echo(f"{account['repeated']:,} rows repeat an earlier one")
    typer.echo(f"{account['also_held_out']:,} training rows are dropped, since held-out rows are the same")
    typer.echo(f"{account['bad']:,} bad rows" + "".join(f"\n  {fault}" for fault in account["faults"]))


def _print_example(title: str, row: dict[str, Any], tokenizer: Any) -> None:
    """What is trained in color, or, in a pipe, between brackets."""
    from rich.console import Console
    from rich.text import Text

    from smoa_lab.data.encoding import Tokens, trained_pieces

    console = Console(highlight=False, soft_wrap=True)
    console.rule(title) if console.is_terminal else console.print(f"\n--- {title}")
    plain = not console.is_terminal
    for text, trained in trained_pieces(tokenizer, Tokens(row["input_ids"], row["labels"])):
        shown = f"⟦{text}⟧" if trained and plain else text
        console.print(Text(shown, style="bold green" if trained else "dim"), end="")
    console.print()
