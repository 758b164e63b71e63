"""Talks to an adapted model: what ``smoa chat`` opens, who answers, the conversation and its commands."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer
from jinja2 import TemplateError
from peft import PeftModel
from transformers import TextStreamer

from smoa.atomic import write_whole
from smoa.errors import DataError, SmoaError, nearest
from smoa_lab import open_run
from smoa_lab.base_models import load_tokenizer, load_weights, packaged_name, positions_of, to_device
from smoa_lab.basics.folders import check_place, free_name
from smoa_lab.config.methods import base_lost
from smoa_lab.data.chat_templates import chat_template, stop_at_turns_end
from smoa_lab.scoring.evaluation import GREEDY, ends_of
from smoa_lab.scoring.losses import scoring
from smoa_lab.training.run_folder import RunFolder

BASE = "base"

COMMANDS = {
    "base": ("", "turn the adapter off, or on again"),
    "both": ("", "answer the last message twice, by the base model and by the adapter"),
    "load": ("OTHER", "load the adapter of another run or folder, and use it"),
    "use": ("[NAME]", "use a loaded adapter; without a name, list them"),
    "system": ("[TEXT]", "set the system prompt; without a text, remove it"),
    "reset": ("", "forget the conversation, but not the system prompt"),
    "save": ("FILE", 'write the conversation to a new file, as a line of JSON: {"messages": […]}'),
    "help": ("", "list the commands"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
"""What follows the name of a command, in brackets if it can be left out, and what it does."""


class Chat:
    """A conversation with the model of a run, an adapter or a model, and a method for each command. An adapter is
    talked to through the template that it was trained with, or all through ``template``. Temperature 0 is greedy. In a
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
        section, adapter = open_run.find_model(place, changes)
        self.section = section
        self.tokenizer: Any = load_tokenizer(section)
        self.own_template = self.tokenizer.chat_template
        # Fails before the weights are read.
        through = chat_template(self.tokenizer, self.own_template, adapter, template)
        self.base_model, _ = load_weights(section)
        to_device(self.base_model)
        self.own_ends: Any = self.base_model.generation_config.eos_token_id
        self.model: Any = self.base_model  # with its adapters, once there are any
        recorded = None if adapter is None else open_run.adapter_config(adapter).base_model_name_or_path
        self.bases = {_canonical(name) for name in (section.name, recorded or section.name)}
        self.template, self.is_terminal = template, is_terminal
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.adapters: dict[str, tuple[str, str]] = {}
        """PEFT's name of each (ours can be words that PEFT refuses), and its chat template."""
        self.name = BASE
        """Who answers; ``adapter`` is the last adapter that did."""
        self.adapter = ""
        self.prompt: list[dict[str, str]] = []
        self.turns: list[dict[str, str]] = []
        self.pieces: list[str] = []  # of the answer that is being written
        self.first = 0  # the oldest turn that the model still sees
        self._talk_through(through)
        if adapter is not None:
            self.load(place, section.name)

    def show(self, piece: str) -> None:
        self.pieces.append(piece)
        typer.echo(piece, nl=False)

    def say(self, note: str) -> None:
        """Show a note, which is no part of an answer."""
        typer.secho(note, dim=self.is_terminal or None, err=not self.is_terminal)

    def respond(self, line: str) -> None:
        """Answer a message, or run a command, which begins with a slash; ``/quit`` raises EOFError."""
        name, _, argument = line.removeprefix("/").strip().partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
        elif name not in COMMANDS:
            raise DataError(f"there is no command /{name}{nearest(name, COMMANDS)}")
        elif COMMANDS[name][0][:1].isupper() and not argument.strip():
            raise DataError(f"/{name} {': '.join(COMMANDS[name])}")
        elif name in ("base", "both") and not self.adapter:
            raise DataError("no adapter is loaded; /load one")
        elif name in ("base", "both") and (lost := [*filter(None, map(base_lost, self.model.peft_config.values()))]):
            raise DataError(f"an adapter here {lost[0]}; talk to the base by itself: smoa chat {self.section.name}")
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
        """Write and show the next message, by the base or by the adapter in use."""
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

    def load(self, place: str, base: str | None = None) -> None:
        """Load the adapter of a folder or of a run, and use it; ``base`` if it is known to be one of this model. The
        model is as before where that fails, or the chat ends: SystemExit, if half of the layers are changed."""
        path = Path(place).expanduser()
        folder = open_run.adapter_of_run(path)
        own = open_run.base_name(folder, base)
        if _canonical(own) not in self.bases:
            found = f"is an adapter of {own}, this model is {', '.join(sorted(self.bases))}"
            raise DataError(f"{place}: {found}; if they are the same, start again with --base")
        if own == self.section.name and base is None:
            open_run.check_base(RunFolder(folder.parent), self.section, False)
        open_run.check_weights(folder)
        through = chat_template(self.tokenizer, self.own_template, folder, self.template)
        taken, inner = {BASE, *self.adapters}, f"chat{len(self.adapters)}"
        name = free_name(open_run.run_name(folder), taken.__contains__)
        if not self.adapters:
            open_run.resize_as_saved(self.base_model, folder)
        try:
            with open_run.loading_adapter(place):
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), inner)
                else:
                    self.model = PeftModel.from_pretrained(self.model, str(folder), inner)
        except SmoaError as error:
            if any(f".{inner}" in parameter for parameter, _ in self.base_model.named_parameters()):
                raise SystemExit(f"error: {error}") from error
            raise
        self.adapters[name] = inner, through
        self.use(name)

    def use(self, name: str) -> None:
        if name and name not in self.adapters:
            raise DataError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}")
        if name:
            inner, template = self.adapters[name]
            self.model.set_adapter(inner)
            self._talk_through(template)
            self.name = self.adapter = name
        self.say(f"Loaded: {', '.join(self.adapters) or 'no adapter'}. {self.name} answers.")

    def _talk_through(self, template: str) -> None:
        """Put messages through this chat template from now on, and stop where it ends a turn."""
        self.tokenizer.chat_template = template
        self.base_model.generation_config.eos_token_id = self.own_ends
        stop_at_turns_end(self.base_model, self.tokenizer)

    def system(self, text: str) -> None:
        prompt = [{"role": "system", "content": text}] if text else []
        self.tokens([*prompt, {"role": "user", "content": "?"}])
        self.prompt = prompt
        self.say("The system prompt is set." if text else "There is no system prompt now.")

    def reset(self) -> None:
        self.turns, self.first = [], 0
        self.say("The conversation starts anew.")

    def save(self, place: str) -> None:
        if not self.turns:
            raise DataError("nothing to save yet")
        file = Path(place).expanduser()
        check_place(file, is_new=True)
        write_whole(file, json.dumps({"messages": [*self.prompt, *self.turns]}, ensure_ascii=False) + "\n")
        self.say(f"{place}: saved, {len(self.turns)} messages")

    def help(self) -> None:
        lines = [f"{f'/{name} {usage}':14}  {text}" for name, (usage, text) in COMMANDS.items()]
        last = "Ctrl-C stops an answer. A message that begins with a slash needs a space before it."
        self.say("\n".join([*lines, last]))

    def quit(self) -> None:
        raise EOFError


def _canonical(base: str) -> str:
    """One name for a packaged model and its folder, and one for a folder with ``~`` and without."""
    return packaged_name(base) or os.path.normpath(Path(base).expanduser().absolute())
