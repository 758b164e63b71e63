"""Talks to an adapted model: who answers, the conversation and its commands."""

from __future__ import annotations

import math
from contextlib import nullcontext
from shlex import quote
from typing import Any

import typer
from jinja2 import TemplateError
from transformers import TextStreamer

from smoa.errors import DataError, SmoaError, nearest
from smoa_lab.base_models import positions_of, to_device
from smoa_lab.basics.folders import free_name
from smoa_lab.config.methods import base_lost
from smoa_lab.open_run import find_model, run_name, with_saved_adapter
from smoa_lab.scoring.evaluation import GREEDY, ends_of
from smoa_lab.scoring.losses import scoring

BASE = "base"

COMMANDS = {
    "base": ("", "turn the adapter off, or on again"),
    "both": ("", "answer the last message twice, by the base model and by the adapter"),
    "system": ("[TEXT]", "set the system prompt; without a text, remove it"),
    "reset": ("", "forget the conversation, but not the system prompt"),
    "help": ("", "list the commands"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
"""What may follow the name of a command, and what it does."""


class Chat:
    """A conversation with the model of a run, an adapter or a model, and a method for each command. An adapter is
    talked to through the template that it was trained with, or through ``template``. Temperature 0 is greedy. In a
    pipe only answers go to stdout, each with an empty line after it, and notes to stderr. Whatever cannot be loaded or
    done raises SmoaError.
    """

    def __init__(
        self,
        place: str,
        changes: dict[str, Any],
        template: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        is_terminal: bool = False,
    ) -> None:
        found = find_model(place, changes, template)
        self.place, self.tokenizer, adapter = found.section.name, found.tokenizer, found.adapter
        if not self.tokenizer.chat_template:  # before the weights are read
            raise DataError(f"{self.place}: its tokenizer has no chat template; use --template alpaca")
        self.base_model = found.load()
        to_device(self.base_model)
        self.model: Any = self.base_model if adapter is None else with_saved_adapter(self.base_model, adapter)
        self.adapter = "" if adapter is None else free_name(run_name(adapter), BASE.__eq__)
        self.name = self.adapter or BASE
        """Who answers."""
        self.is_terminal, self.max_new_tokens, self.temperature = is_terminal, max_new_tokens, temperature
        self.refused = False
        """Whether a line was."""
        self.prompt: list[dict[str, str]] = []
        self.turns: list[dict[str, str]] = []
        self.pieces: list[str] = []  # of the answer that is being written
        self.first = 0  # the oldest turn that the model still sees
        if self.adapter:
            self.say(f"{self.name} answers.")

    def show(self, piece: str) -> None:
        self.pieces.append(piece)
        typer.echo(piece, nl=False)

    def say(self, note: str) -> None:
        """Show a note, which is no part of an answer."""
        typer.secho(note, dim=self.is_terminal or None, err=not self.is_terminal)

    def refuse(self, line: str, error: SmoaError) -> None:
        """Say why a line isn't answered. In a pipe a text's answer is then empty, so that later ones keep their
        places."""
        self.say(f"error: {error}")
        self.refused = True
        is_command = line.startswith("/") and [*line[1:].split(), ""][0] in COMMANDS
        if not (self.is_terminal or is_command):
            typer.echo("\n")

    def respond(self, line: str) -> None:
        """Answer a message, or run a command, which begins with a slash; ``/quit`` raises EOFError."""
        name, _, argument = line.removeprefix("/").strip().partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
        elif name not in COMMANDS:
            raise DataError(f"there is no command /{name}{nearest(name, COMMANDS)}")
        elif name in ("base", "both") and not self.adapter:
            raise DataError("this is a model without an adapter; start again with the folder of an adapter or a run")
        elif name in ("base", "both") and (lost := base_lost(self.model.active_peft_config)) is not None:
            raise DataError(f"the adapter {lost}; talk to the base by itself: smoa chat {quote(self.place)}")
        else:
            getattr(self, name)(*([argument.strip()] if COMMANDS[name][0] else []))

    def ask(self, text: str) -> None:
        """Answer a message. An answer that is interrupted is kept as far as it got."""
        question = {"role": "user", "content": text}
        seen = self._seen([*self.turns, question])
        self.pieces = []
        try:
            self.write(seen, self.name)
        finally:
            if self.pieces:
                self.turns += [question, {"role": "assistant", "content": "".join(self.pieces).strip()}]

    def tokens(self, messages: list[dict[str, str]]) -> Any:
        """The model's inputs for its next message; raises DataError if the chat template refuses the messages."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses this: {error}") from error

    def _seen(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """What the model sees: the system prompt, and as many of the latest turns as fit with the longest answer."""
        first, positions = self.first, positions_of(self.base_model.config) or math.inf
        while True:
            seen = [*self.prompt, *turns[first:]]
            excess = self.tokens(seen)["input_ids"].shape[1] + self.max_new_tokens - positions
            if excess <= 0:
                break
            first += 2  # a question and its answer
            if first >= len(turns):
                both = f"the message and {self.max_new_tokens} tokens for the answer exceed the model's positions"
                raise DataError(f"{both} by {excess}; shorten the message, or lower --max-new-tokens")
        if first and not self.first:
            self.say("The conversation is longer than the model can read: it no longer sees the oldest turns.")
        self.first = first
        return seen

    def write(self, messages: list[dict[str, str]], name: str) -> None:
        """Write and show the next message, by the base or by the adapter."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        vars(streamer)["on_finalized_text"] = lambda text, stream_end=False: (
            self.show(text) if text or stream_end else None
        )
        adapter: Any = self.model.disable_adapter() if name == BASE and self.adapter else nullcontext()
        options = {"do_sample": True, "temperature": self.temperature} if self.temperature else GREEDY
        try:
            with scoring(self.model), adapter:
                self.model.generate(
                    **self.tokens(messages).to(self.base_model.device),
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=ends_of(self.base_model, self.tokenizer),
                    streamer=streamer,
                    num_beams=1,  # a streamer takes no more
                    **options,
                )
        finally:
            typer.echo("" if self.is_terminal else "\n")

    def base(self) -> None:
        self.name = self.adapter if self.name == BASE else BASE
        self.say(f"{self.name} answers.")

    def both(self) -> None:
        if not self.turns:
            raise DataError("no message to answer yet")
        seen = self._seen(self.turns[:-1])
        for name in (BASE, self.adapter):
            self.say(f"{name}:")
            self.write(seen, name)

    def system(self, text: str) -> None:
        prompt = [{"role": "system", "content": text}] if text else []
        self.tokens([*prompt, {"role": "user", "content": "?"}])
        self.prompt = prompt
        self.say("The system prompt is set." if text else "There is no system prompt now.")

    def reset(self) -> None:
        self.turns, self.first = [], 0
        self.say("The conversation starts anew.")

    def help(self) -> None:
        lines = [f"{f'/{name} {usage}':14}  {text}" for name, (usage, text) in COMMANDS.items()]
        last = "Ctrl-C stops an answer. A message that begins with a slash needs a space before it."
        self.say("\n".join([*lines, last]))

    def quit(self) -> None:
        raise EOFError
