"""Strings that end an answer, which the answer does not contain: OpenAI's ``stop``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stops:
    """Those of a request, for answers that this tokenizer decodes."""

    strings: Sequence[str]
    tokenizer: Any

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the last of the tokens completes one of the strings."""
        longest = max(len(string.encode()) for string in self.strings)
        text = self.tokenizer.decode(tokens[-longest - 8 :], skip_special_tokens=True)  # a token has a byte or more
        is_whole = not text.endswith("\ufffd")  # a stream shows a token with a part of a character only when it is
        return is_whole and self.before(text) is not None

    def before(self, text: str) -> str | None:
        """The text before the first of the strings in it; None if there is none."""
        ends = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(ends)] if ends else None

    def begun(self, text: str) -> int:
        """How many of the last characters may be the beginning of one of the strings."""
        sizes = ((string, range(min(len(string) - 1, len(text)), 0, -1)) for string in self.strings)
        return max(
            (next((size for size in own if text.endswith(string[:size])), 0) for string, own in sizes), default=0
        )


class UntilStop:
    """A stream's queue of text that ends before a string of ``stops``, at which it calls ``stopped``; what may be its
    beginning is held back."""

    def __init__(self, queue: asyncio.Queue[Any], stops: Stops, stopped: Callable[[], object]) -> None:
        self._queue, self._stops, self._stopped = queue, stops, stopped
        self._held, self._ready, self._ended = "", deque[Any](), False

    async def get(self) -> Any:
        """The next text, error or end, as the queue has it."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Likewise; raises QueueEmpty."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if not isinstance(item, str):
            self._ready += [self._held, item] if self._held else [item]
            self._held = ""
        elif not self._ended:
            text = self._held + item
            before = self._stops.before(text)
            if before is not None:
                self._ended = True
                self._stopped()
            shown = text[: len(text) - self._stops.begun(text)] if before is None else before
            self._held = "" if self._ended else text[len(shown) :]
            self._ready += [shown] if shown else []
