"""The ``smoa`` command with its subcommands. Nothing heavy is imported before one runs, so ``--help`` is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from smoa_lab.cli import adapters, chat, compare, data, demo, eval, init, train, tune

app = typer.Typer(
    name="smoa",
    help="Fine-tune, score and merge language models with SMoA, the Spectrum Modulation Adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smoa {version('smoa')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("init")(init.init)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("eval")(eval.evaluate)
app.command("report")(adapters.report)
app.command("chat")(chat.chat)
app.command("merge")(adapters.merge)
app.command("convert")(adapters.convert)
app.command("verify")(adapters.verify)
app.command("compare")(compare.compare)
app.command("inspect")(adapters.inspect)
app.command("budget")(adapters.budget)
app.command("demo")(demo.demo)
app.command("run", context_settings=adapters.RUN_SETTINGS)(adapters.run)
app.add_typer(data.app, name="data")
