"""The slash commands of a chat, as a table from which ``/help`` is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smoa.errors import DataError
from smoa_lab.basics.nearest import nearest
from smoa_lab.chat.conversation import Conversation


@dataclass(frozen=True)
class Command:
    """What follows the name (in brackets if it can be left out), what the command does, and how. ``run`` is given the
    conversation and what follows the name, and returns what to say."""

    argument: str
    help: str
    run: Callable[[Conversation, str], str | None]


def run_command(conversation: Conversation, line: str) -> None:
    """Run a line that begins with a slash.

    Raises:
        EOFError: it is ``/quit``.
        DataError: there is no such command, or its argument is missing.
        SmoaError: what the command itself raises.
    """
    name, _, argument = line.removeprefix("/").strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise DataError(f"there is no command /{name}{nearest(name, COMMANDS)}")
    if command.argument[:1].isupper() and not argument:
        raise DataError(f"/{name} {command.argument}: {command.help}")
    note = command.run(conversation, argument.strip())
    if note:
        conversation.screen.say(note)


def _base(conversation: Conversation, argument: str) -> str:
    conversation.speaker.toggle()
    return f"From now on {conversation.speaker.name} answers."


def _both(conversation: Conversation, argument: str) -> None:
    conversation.ask_both()


def _load(conversation: Conversation, argument: str) -> str:
    conversation.speaker.load(argument)
    return f"From now on {conversation.speaker.name} answers."


def _use(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.speaker.use(argument)
    return f"Loaded: {', '.join(conversation.speaker.adapters) or 'no adapter'}. {conversation.speaker.name} answers."


def _system(conversation: Conversation, argument: str) -> str:
    conversation.set_system(argument)
    return "The system prompt is set." if argument else "There is no system prompt now."


def _reset(conversation: Conversation, argument: str) -> str:
    conversation.reset()
    return "The conversation starts anew."


def _save(conversation: Conversation, argument: str) -> str:
    return conversation.save(argument)


def _help(conversation: Conversation, argument: str) -> str:
    usages = {f"/{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    lines = [f"{usage.ljust(width)}  {text}" for usage, text in usages.items()]
    return "\n".join([*lines, "Ctrl-C stops an answer. A message that begins with a slash needs a space before it."])


def _quit(conversation: Conversation, argument: str) -> None:
    raise EOFError


COMMANDS: dict[str, Command] = {
    "base": Command("", "turn the adapter off, or on again", _base),
    "both": Command("", "answer the last message twice, by the base model and by the adapter", _both),
    "load": Command("OTHER", "load the adapter of another run or folder, and use it", _load),
    "use": Command("[NAME]", "use a loaded adapter; without a name, list them", _use),
    "system": Command("[TEXT]", "set the system prompt; without a text, remove it", _system),
    "reset": Command("", "forget the conversation, but not the system prompt", _reset),
    "save": Command("FILE", 'write the conversation to a file, as a line of JSON: {"messages": […]}', _save),
    "help": Command("", "list the commands", _help),
    "quit": Command("", "end the chat, as Ctrl-D does", _quit),
}
