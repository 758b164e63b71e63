"""``smoa``: gathers the subcommands. Nothing heavy is imported before a subcommand runs, so ``--help`` is instant."""

from __future__ import annotations

import typer

from smoa.cli import demo, train

app = typer.Typer(
    name="smoa",
    help="Fine-tune, score and merge language models with SMoA, the Spectrum Modulation Adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("demo")(demo.demo)

if __name__ == "__main__":
    app()
