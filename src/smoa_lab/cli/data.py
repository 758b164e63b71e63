"""``smoa data check``: shows what a user's own rows would train."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import AsJson, Trusted, print_json, reporting

app = typer.Typer(help="Look at your own rows before a run.", no_args_is_help=True)


@app.command(epilog="Example: smoa data check chats.jsonl --model smollm2-135m --examples 10")
def check(
    place: Annotated[str, typer.Argument(help="Rows: a file, a folder or a data set's name; or a run's YAML file.")],
    model: Annotated[str, typer.Option(help="Model whose tokenizer and template to use.")] = "smollm2-135m",
    format: Annotated[str | None, typer.Option(help="data.format, if the columns do not show it.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="data.max_length: tokens at which a row is cut.")] = 1024,
    template: Annotated[str | None, typer.Option(help="data.template instead of the model's own, e.g. alpaca.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Show what would be trained on: formats, lengths, what is cut or dropped, bad rows, and examples.

    Exit code 1: there are bad rows, which aren't to be skipped, or none to train on.
    """
    with reporting():
        from smoa_lab.base_models import load_tokenizer
        from smoa_lab.config.run import check_config, load_config
        from smoa_lab.training.loaded_run import check_trainer, read_rows_of

        if place.endswith((".yaml", ".yml")):
            config = load_config(place)
        else:
            data = {"train": place, "format": format, "template": template, "max_length": max_length}
            config = check_config({"model": {"name": model}, "data": data, "training": {}}, place)
        tokenizer = load_tokenizer(config.model)
        _, rows = read_rows_of(config, tokenizer)
        account, trained = rows.account, rows.account["parts"].get("train", 0)
        if json:
            print_json(account)
        else:
            _print_account(place, config.model.name, account)
            for number, row in enumerate(islice(rows.part("train"), examples), start=1):
                _print_example(f"example {number} of {min(examples, trained)}", row, tokenizer)
        if place.endswith((".yaml", ".yml")):
            check_trainer(config, account["format"])
        if not trained or (account["bad"] and not config.data.skip_bad_rows):
            raise typer.Exit(1)


def _print_account(place: str, model: str, account: dict[str, Any]) -> None:
    tokens, parts = account["tokens"], account["parts"]
    counts = ", ".join(f"{number:,} {part}" for part, number in parts.items()) or "none that can be trained on"
    typer.echo(f"{place}: {account['format'] or 'no format recognized'}; rows: {counts}")
    if tokens["total"]:
        typer.echo(
            f"{tokens['total']:,} tokens of {model}, {account['trained_tokens']:,} of them trained; a row has "
            f"{tokens['shortest']:,} to {tokens['longest']:,}, half of them at most {tokens['median']:,}\n"
        )
        most = max(count for _, count in tokens["histogram"])
        for bound, count in tokens["histogram"]:
            typer.echo(f"{f'up to {bound:,}':>13}  {'█' * round(40 * count / most):40}  {count:,}")
        typer.echo()
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
