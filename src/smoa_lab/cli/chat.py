"""``smoa chat``: talks to an adapted model in the terminal, or answers the lines of a pipe."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from smoa_lab.cli.console import Base, BaseDtype, Trusted, reporting

if TYPE_CHECKING:
    from smoa_lab.chat import Chat


def chat(
    place: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="Folder of a run, of an adapter or of a model, or a Hub id.")
    ],
    base: Base = None,
    dtype: BaseDtype = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    template: Annotated[str | None, typer.Option(help="alpaca, a name that TRL has, or a .jinja file.")] = None,
    trust_remote_code: Trusted = False,
) -> None:
    """Chat with an adapted model and compare it with its base; /help lists the commands."""
    given = {"name": base, "dtype": dtype}
    changes = {key: value for key, value in given.items() if value is not None}
    with reporting():
        from smoa_lab.chat import Chat

        try:
            chat = Chat(place, changes, template, max_new_tokens, temperature, _is_terminal())
            if system:
                chat.system(system)
            _talk(chat)
        except KeyboardInterrupt:  # while the model is loaded, and in a pipe: there is nothing to resume
            raise typer.Exit(130) from None


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _talk(chat: Chat) -> None:
    from smoa.errors import SmoaError

    if chat.is_terminal:
        with suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # input() then keeps a history
        chat.say("/help lists the commands.")
    while True:
        try:
            chat.respond(input(f"{chat.name}> " if chat.is_terminal else ""))
        except SmoaError as error:
            chat.say(f"error: {error}")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not chat.is_terminal:
                raise
            chat.say("\nInterrupted. /quit or Ctrl-D ends the chat.")
