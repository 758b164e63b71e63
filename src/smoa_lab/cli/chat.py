"""``smoa chat``: talks to an adapted model in the terminal, or answers the lines of a pipe."""

from __future__ import annotations

import importlib
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smoa_lab.cli.console import Base, Dtype, TrustRemoteCode, reporting

if TYPE_CHECKING:
    from smoa_lab.chat import Conversation

Template = Literal["chat", "alpaca"]


def chat(
    place: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_FOLDER", help="Folder of a run, of an adapter or of a model, or a Hub id."),
    ],
    base: Base = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="model.dtype; by default the run's, or what suits the machine.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    template: Annotated[
        Template | None,
        typer.Option(
            help="The model's own chat template, or Alpaca's; by default the run's, or chat.", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with an adapted model and compare it with its base; /help lists the commands."""
    changes: dict[str, Any] = {"name": base, "dtype": dtype, "trust_remote_code": trust_remote_code or None}
    with reporting():
        from smoa_lab.chat import Conversation, GenerationSettings, Screen, find, load

        try:
            target = find(place, {key: value for key, value in changes.items() if value is not None}, template)
            model = load(target, GenerationSettings(max_new_tokens, temperature))
            screen = Screen(is_terminal=_is_terminal())
            conversation = Conversation(model, screen, system)
            (_talk if screen.is_terminal else _answer_lines)(conversation)
        except KeyboardInterrupt:  # while the model is loaded, and in a pipe: there is nothing to resume
            raise typer.Exit(130) from None


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _talk(conversation: Conversation) -> None:
    with suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # input() then keeps a history
    conversation.screen.say(f"{conversation.model.name} answers. /help lists the commands.")
    with suppress(EOFError):
        while True:
            try:
                _respond(conversation, _typed(f"{conversation.model.name}> "))
            except KeyboardInterrupt:
                conversation.screen.say("Interrupted. /quit or Ctrl-D ends the chat.")


def _typed(prompt: str) -> str:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        typer.echo()  # their keys leave the line open
        raise


def _answer_lines(conversation: Conversation) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that can't be read must not end the others
    with suppress(EOFError):
        for line in sys.stdin:
            _respond(conversation, line.rstrip("\r\n"))


def _respond(conversation: Conversation, line: str) -> None:
    from smoa.errors import DataError, SmoaError
    from smoa_lab.chat import run_command

    try:
        if line != line.encode(errors="replace").decode():
            raise DataError("a line is not text in UTF-8; it is left out")
        if line.startswith("/"):
            run_command(conversation, line)
        elif line.strip():
            conversation.ask(line.strip())
    except SmoaError as error:
        conversation.screen.say(f"error: {error}")
