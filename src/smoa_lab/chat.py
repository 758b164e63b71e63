"""Talks to an adapted model: what ``smoa chat`` opens, who answers, the conversation and its commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from jinja2 import TemplateError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa import cached_weights
from smoa.atomic import recover, write_whole
from smoa.errors import ConfigError, DataError, SmoaError, nearest
from smoa_lab.base_models import load_base_model, load_tokenizer, packaged_name, to_device
from smoa_lab.basics.cache import free_name
from smoa_lab.basics.positions import positions_of
from smoa_lab.config.run import ModelSection, native_dtype
from smoa_lab.data.chat_templates import alpaca, saved_chat_template, stop_at_turns_end
from smoa_lab.data.rows import Template
from smoa_lab.open_run import (
    adapter_config,
    adapter_of_run,
    base_name,
    base_section,
    loading_adapter,
    open_run,
    run_name,
    trained_template,
)
from smoa_lab.scoring.generation import ends_of
from smoa_lab.scoring.losses import scoring
from smoa_lab.training.run_folder import RunFolder

Message = dict[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True)
class ChatTarget:
    """What to load. Nothing is loaded yet. ``forced``: whether the command names the template, for all adapters."""

    model: ModelSection
    adapter: Path | None
    template: Template
    forced: bool = False


def find(place: str, changes: dict[str, Any], template: Template | None = None) -> ChatTarget:
    """What ``place`` is. ``changes`` are laid over the model's section: ``name``, ``dtype``, ``trust_remote_code``.

    A run is talked to through the template that it was trained with, everything else through the model's own.

    Raises:
        ConfigError: ``place`` is a folder with none of the things to talk to.
    """
    path, forced = Path(place).expanduser(), template is not None
    if RunFolder(path).finished:
        config, adapter = open_run(path, trust_remote_code=changes.get("trust_remote_code", False))
        return ChatTarget(config.model.model_copy(update=changes), adapter, template or trained_template(path), forced)
    recover(path)
    adapter, model = None, ModelSection(name=place)
    if any((folder / CONFIG_NAME).is_file() for folder in (path, RunFolder(path).adapter)):
        adapter = adapter_of_run(path)
        model = base_section(adapter, changes.get("name")).model_copy(update={"dtype": native_dtype()})
    elif path.is_dir() and not (path / MODEL_CONFIG_NAME).is_file():
        raise ConfigError(
            f"{place}: contains no finished run (metrics.json), adapter ({CONFIG_NAME}) or model ({MODEL_CONFIG_NAME})"
        )
    return ChatTarget(model.model_copy(update=changes), adapter, template or "chat", forced)


def load(target: ChatTarget, settings: GenerationSettings) -> ChatModel:
    """The model, with the adapter if there is one.

    Raises:
        DataError: model or adapter cannot be loaded, or the model has no chat template.
    """
    tokenizer = load_tokenizer(target.model)
    # Fails before the weights are read.
    template = chat_template(tokenizer, tokenizer.chat_template, target.adapter, target.template)
    model, _ = load_base_model(target.model)
    to_device(model)
    recorded = None if target.adapter is None else adapter_config(target.adapter).base_model_name_or_path
    bases = [target.model.name, recorded or target.model.name]
    chat_model = ChatModel(model, tokenizer, settings, bases, target.template if target.forced else None)
    chat_model.talk_through(template)
    if target.adapter is not None:
        chat_model.load(str(target.adapter), target.model.name, target.template)
    return chat_model


class ChatModel:
    """A base model that answers, and the adapters loaded on it. ``bases`` are the names by which adapters may call the
    base.

    An adapter is talked to through the template that it was trained with, or all through ``template``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        bases: Sequence[str],
        template: Template | None = None,
    ) -> None:
        self.base = model
        self.model: Any = model  # with its adapters, once there are any
        self.tokenizer: Any = tokenizer
        self.settings = settings
        self.bases = {_canonical(name) for name in bases}
        self.template = template
        self.own_template, self.own_ends = tokenizer.chat_template, model.generation_config.eos_token_id
        self.adapters: dict[str, tuple[str, str]] = {}
        """PEFT's name of each (ours can be words that PEFT refuses), and its chat template."""
        self.chosen: str | None = None
        self.uses_adapter = False

    @property
    def name(self) -> str:
        """The adapter that answers, or ``base``."""
        return self.chosen if self.chosen is not None and self.uses_adapter else "base"

    def toggle(self) -> None:
        """Turn the adapter off, or on again."""
        self.require_adapter()
        self.uses_adapter = not self.uses_adapter

    def require_adapter(self) -> None:
        """Raise DataError if no adapter is loaded."""
        if self.chosen is None:
            raise DataError("no adapter is loaded; /load one")

    def use(self, name: str) -> None:
        """Answer with this loaded adapter."""
        if name not in self.adapters:
            raise DataError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}")
        inner, template = self.adapters[name]
        self.model.set_adapter(inner)
        self.talk_through(template)
        self.chosen, self.uses_adapter = name, True

    def talk_through(self, template: str) -> None:
        """Put messages through this chat template from now on, and stop where it ends a turn."""
        self.tokenizer.chat_template = template
        self.base.generation_config.eos_token_id = self.own_ends
        stop_at_turns_end(self.base, self.tokenizer)

    def load(self, place: str, base: str | None = None, template: Template | None = None) -> None:
        """Load the adapter of a folder or of a run, and use it; ``base`` if it is known to be one of this model, and
        ``template`` if it is known.

        Raises:
            SmoaError: there is none, or it does not fit. The model is as before.
        """
        path = Path(place).expanduser()
        folder = adapter_of_run(path)
        own = base_name(folder, base)
        if _canonical(own) not in self.bases:
            raise DataError(
                f"{place}: is an adapter of {own}, this model is {', '.join(sorted(self.bases))}; "
                "if they are the same, start again with --base"
            )
        template = template or self.template or trained_template(path)
        through = chat_template(self.tokenizer, self.own_template, folder, template)
        name, inner = free_name(run_name(folder), self.adapters.__contains__), f"chat{len(self.adapters)}"
        try:
            with loading_adapter(place):
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), inner)
                else:
                    self.model = PeftModel.from_pretrained(self.model, str(folder), inner)
        except SmoaError:
            self._remove(inner)
            raise
        self.adapters[name] = inner, through
        self.use(name)

    def _remove(self, inner: str) -> None:
        """Remove what a failed load left."""
        if isinstance(self.model, PeftModel):
            if inner in self.model.peft_config:
                self.model.delete_adapter(inner)
            return
        for name, layer in list(self.base.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self.base.set_submodule(name, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper):
                self.base.set_submodule(name, layer.original_module)
        vars(self.base).pop("peft_config", None)

    def tokens(self, messages: Sequence[Message]) -> Any:
        """The model's inputs for its next message.

        Raises:
            DataError: the chat template refuses the messages, for example a system prompt.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses this: {error}") from error

    def excess(self, messages: Sequence[Message]) -> int:
        """The number of tokens by which the messages and the longest answer exceed the model's positions."""
        positions = positions_of(self.base.config)
        wanted = self.tokens(messages)["input_ids"].shape[1] + self.settings.max_new_tokens
        return 0 if positions is None else max(0, wanted - positions)

    def write(self, messages: Sequence[Message], show: Callable[[str], None], adapted: bool | None = None) -> None:
        """Write the next message and show it piece by piece, with the adapter or without, by default as it is set."""
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.settings.temperature:
            options = {"do_sample": True, "temperature": self.settings.temperature}
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        vars(streamer)["on_finalized_text"] = lambda text, stream_end=False: show(text) if text or stream_end else None
        with ExitStack() as stack:
            stack.enter_context(scoring(self.model))
            if self.uses_adapter if adapted is None else adapted:
                stack.enter_context(cached_weights(self.model))  # anew: an adapter may have added layers
            elif self.chosen is not None:
                stack.enter_context(self.model.disable_adapter())
            self.model.generate(
                **self.tokens(messages).to(self.base.device),
                max_new_tokens=self.settings.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends_of(self.base, self.tokenizer),
                streamer=streamer,
                **options,
            )


def chat_template(tokenizer: Any, own: Any, adapter: Path | None, template: Template) -> str:
    """The chat template of an adapter or, where none is saved with it, its base's ``own``.

    Raises:
        DataError: neither has one.
    """
    if template == "alpaca":
        return alpaca(tokenizer)
    text = (None if adapter is None else saved_chat_template(adapter)) or own
    if not text:
        raise DataError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; use --template alpaca")
    return str(text)


def _canonical(base: str) -> str:
    """One name for a packaged model and its folder, and one for a folder with ``~`` and without."""
    place = str(Path(base).expanduser())
    return packaged_name(place) or place


class Screen:
    """Shows answers as they are written, and notes between them. In a pipe only answers go to stdout, each with an
    empty line after it, and notes to stderr."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal

    def write(self, piece: str) -> None:
        """Show a piece of an answer."""
        typer.echo(piece, nl=False)

    def end(self) -> None:
        """End an answer."""
        typer.echo("" if self.is_terminal else "\n")

    def say(self, note: str) -> None:
        """Show a note, which is no part of an answer."""
        typer.secho(note, dim=self.is_terminal or None, err=not self.is_terminal)


class Conversation:
    """Questions and answers in turn. ``first`` is the oldest turn that the model still sees."""

    def __init__(self, model: ChatModel, screen: Screen, system: str | None = None) -> None:
        self.model = model
        self.screen = screen
        self.system: list[Message] = []
        self.turns: list[Message] = []
        self.first = 0
        self.files: set[Path] = set()
        self.set_system(system or "")

    def set_system(self, text: str) -> None:
        """Set the system prompt; an empty one removes it.

        Raises:
            DataError: the model's chat template takes none.
        """
        system = [{"role": "system", "content": text}] if text else []
        self.model.tokens([*system, {"role": "user", "content": "?"}])
        self.system = system

    def reset(self) -> None:
        """Forget all turns and keep the system prompt."""
        self.turns, self.first = [], 0

    def ask(self, text: str) -> None:
        """Answer a message. An answer that is interrupted is kept as far as it got.

        Raises:
            DataError: the message is too long for the model.
        """
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        prompt = self._prompt([*self.turns, question])
        try:
            self._answer(prompt, pieces)
        finally:
            if pieces:
                self.turns += [question, {"role": "assistant", "content": "".join(pieces).strip()}]

    def ask_both(self) -> None:
        """Answer the last message by the base model and by the adapter. The conversation stays as it is.

        Raises:
            DataError: there is no message, or no adapter.
        """
        self.model.require_adapter()
        if not self.turns:
            raise DataError("no message to answer yet")
        prompt = self._prompt(self.turns[:-1])
        for name, adapted in (("base", False), (self.model.chosen, True)):
            self.screen.say(f"{name}:")
            self._answer(prompt, [], adapted)

    def _answer(self, prompt: list[Message], pieces: list[str], adapted: bool | None = None) -> None:
        def show(piece: str) -> None:
            pieces.append(piece)
            self.screen.write(piece)

        try:
            self.model.write(prompt, show, adapted)
        finally:
            self.screen.end()

    def _prompt(self, turns: list[Message]) -> list[Message]:
        """What the model sees: the system prompt, and as many of the latest turns as fit."""
        first = self.first
        while excess := self.model.excess([*self.system, *turns[first:]]):
            first += 2  # a question and its answer
            if first >= len(turns):
                raise DataError(
                    f"the message and {self.model.settings.max_new_tokens} tokens for the answer exceed the model's "
                    f"positions by {excess}; shorten the message, or lower --max-new-tokens"
                )
        if first and not self.first:
            self.screen.say("The conversation is longer than the model can read: it no longer sees the oldest turns.")
        self.first = first
        return [*self.system, *turns[first:]]

    def save(self, place: str) -> str:
        """Write the conversation as one line of JSON, ``{"messages": […]}``, and say what was written.

        Raises:
            ConfigError: another file of that name exists.
            DataError: there is nothing to save, or the file cannot be written.
        """
        file = Path(place).expanduser().resolve()
        if not self.turns:
            raise DataError("nothing to save yet")
        if file.exists() and file not in self.files:
            raise ConfigError(f"{place}: exists and was not saved by this chat; choose another name")
        done = "replaced" if file in self.files else "saved"
        row = json.dumps({"messages": [*self.system, *self.turns]}, ensure_ascii=False)
        try:
            write_whole(file, row + "\n")
        except OSError as error:
            raise DataError(f"{place}: cannot be written: {error}") from error
        self.files.add(file)
        return f"{place}: {done}, {len(self.turns)} messages"


COMMANDS = {
    "base": ("", "turn the adapter off, or on again"),
    "both": ("", "answer the last message twice, by the base model and by the adapter"),
    "load": ("OTHER", "load the adapter of another run or folder, and use it"),
    "use": ("[NAME]", "use a loaded adapter; without a name, list them"),
    "system": ("[TEXT]", "set the system prompt; without a text, remove it"),
    "reset": ("", "forget the conversation, but not the system prompt"),
    "save": ("FILE", 'write the conversation to a file, as a line of JSON: {"messages": […]}'),
    "help": ("", "list the commands"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
"""What follows the name of a command, in brackets if it can be left out, and what it does."""


def run_command(conversation: Conversation, line: str) -> None:
    """Run a line that begins with a slash, and say what it did.

    Raises:
        EOFError: it is ``/quit``.
        DataError: there is no such command, or its argument is missing.
        SmoaError: what the command itself raises.
    """
    name, _, argument = line.removeprefix("/").strip().partition(" ")
    if name not in COMMANDS:
        raise DataError(f"there is no command /{name}{nearest(name, COMMANDS)}")
    usage, text = COMMANDS[name]
    argument, model, say = argument.strip(), conversation.model, conversation.screen.say
    if usage[:1].isupper() and not argument:
        raise DataError(f"/{name} {usage}: {text}")
    match name:
        case "base" | "load":
            model.load(argument) if name == "load" else model.toggle()
            say(f"From now on {model.name} answers.")
        case "both":
            conversation.ask_both()
        case "use":
            if argument:
                model.use(argument)
            say(f"Loaded: {', '.join(model.adapters) or 'no adapter'}. {model.name} answers.")
        case "system":
            conversation.set_system(argument)
            say("The system prompt is set." if argument else "There is no system prompt now.")
        case "reset":
            conversation.reset()
            say("The conversation starts anew.")
        case "save":
            say(conversation.save(argument))
        case "help":
            lines = [f"{f'/{name} {usage}':14}  {text}" for name, (usage, text) in COMMANDS.items()]
            last = "Ctrl-C stops an answer. A message that begins with a slash needs a space before it."
            say("\n".join([*lines, last]))
        case "quit":
            raise EOFError
