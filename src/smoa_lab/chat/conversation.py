"""A conversation: the system prompt, the turns so far, and the model that answers. Knows no terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.chat.speaker import Message, Speaker


class Screen(Protocol):
    """Where answers and notes appear."""

    def write(self, piece: str) -> None:
        """Show a piece of an answer."""

    def end(self) -> None:
        """End an answer."""

    def say(self, note: str) -> None:
        """Show a note, which is no part of an answer."""


class Conversation:
    """Questions and answers in turn. ``first`` is the oldest turn that the model still sees."""

    def __init__(self, speaker: Speaker, screen: Screen, system: str | None = None) -> None:
        self.speaker = speaker
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
        self.speaker.tokens([*system, {"role": "user", "content": "?"}])
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
        self.speaker.require_adapter()
        if not self.turns:
            raise DataError("no message to answer yet")
        prompt = self._prompt(self.turns[:-1])
        for name, adapted in (("base", False), (self.speaker.chosen, True)):
            self.screen.say(f"{name}:")
            self._answer(prompt, [], adapted)

    def _answer(self, prompt: list[Message], pieces: list[str], adapted: bool | None = None) -> None:
        def show(piece: str) -> None:
            pieces.append(piece)
            self.screen.write(piece)

        try:
            self.speaker.write(prompt, show, adapted)
        finally:
            self.screen.end()

    def _prompt(self, turns: list[Message]) -> list[Message]:
        """What the model sees: the system prompt, and as many of the latest turns as fit."""
        first = self.first
        while excess := self.speaker.excess([*self.system, *turns[first:]]):
            first += 2  # a question and its answer
            if first >= len(turns):
                raise DataError(
                    f"the message and {self.speaker.writing.max_new_tokens} tokens for the answer exceed the model's "
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
