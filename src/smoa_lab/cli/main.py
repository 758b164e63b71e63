"""The ``smoa`` command with its subcommands. Nothing heavy is imported before one runs, so ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from smoa_lab.cli import adapters, runs, studies

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


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "init": (runs.init, "smoa init my.yaml --model smollm2-135m --data chats.jsonl"),
    "train": (runs.train, "smoa train --model smollm2-135m --data chats.jsonl training.max_steps=100"),
    "tune": (studies.tune, "smoa tune my.yaml --max-runs 4"),
    "eval": (runs.evaluate, "smoa eval runs/my --output scores.json"),
    "chat": (adapters.chat, "smoa chat runs/my --temperature 0.7"),
    "merge": (adapters.merge, "smoa merge runs/my merged --dtype float32"),
    "convert": (adapters.convert, "smoa convert runs/my lora --rank 16"),
    "verify": (adapters.verify, "smoa verify runs/my --against merged --against lora"),
    "compare": (studies.compare, "smoa compare --model smollm2-135m --data chats.jsonl"),
    "inspect": (adapters.inspect, "smoa inspect runs/my runs/lora"),
    "budget": (adapters.budget, "smoa budget gemma3-270m lora:8"),
}
"""Each command's function and an example, in the order of ``smoa --help``."""
EXEC = "smoa exec lm_eval --model hf --model_args pretrained=google/gemma-3-270m,peft=out --tasks arc_easy"

for name, (function, example) in COMMANDS.items():
    app.command(name, epilog=f"Example: {example}")(function)
app.command("exec", epilog=f"Example: {EXEC}", context_settings=adapters.EXEC_SETTINGS)(adapters.execute)
app.add_typer(runs.data_app, name="data")
