"""The adapters that a server has: those in a folder at this moment."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from smoa import AdapterPool
from smoa.errors import ConfigError, DataError, nearest
from smoa.serving.pool import NoSlotError
from smoa.serving.saved import folder_in
from smoa.tuner.generation import BASE
from smoa_lab.data.chat_templates import chat_template, stop_at_turns_end
from smoa_lab.serving.requests import refusal
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

ALIAS = "base"
"""The base's other name."""
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
"""What an adapter's folder has to have."""
PAUSE = 0.02
"""Seconds between two looks for a free slot."""


@dataclass(frozen=True)
class Served:
    """The base or an adapter as it is served: ``key`` is its name in the pool, ``state`` that of its files, ``ends``
    are the tokens that end a turn of a chat."""

    name: str
    key: str
    state: Any
    tokenizer: Any
    ends: Any


class Adapters:
    """The adapters that are in a folder at this moment, each in a folder of its name, or in a run of its name.

    A folder whose files have other sizes or times of change than when they were read is read again; requests that run
    keep the adapter that they began with. The ``pool`` holds them, and nobody else loads into it.
    """

    def __init__(self, pool: AdapterPool, tokenizer: Any, base: str, folder: Path) -> None:
        self.pool, self.tokenizer, self.base, self.folder = pool, tokenizer, base, folder
        self._lock, self._turn, self._numbers = threading.Lock(), asyncio.Lock(), count(1)
        self._served = {base: self._as_served(base, BASE, None, None)}

    def listed(self) -> list[dict[str, Any]]:
        """The base and all adapters, as ``/v1/models`` has them."""
        found = [{"id": self.base, "object": "model", "created": 0, "owned_by": "smoa"}]
        for name, place in self._places().items():
            with suppress(OSError):
                created = int(_state(place)[0][0] // 1e9)
                found.append({"id": name, "object": "model", "created": created, "owned_by": "smoa"})
        return found

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[Served]:
        """The adapter of a name, in a slot of the pool until the context ends; waits while all slots are in use. Who
        came first is served first, so that adapters with many requests keep nobody out. Raises HTTPException if there
        is none (404), or it can't be served (422)."""
        async with self._turn:
            while True:
                holding = asyncio.ensure_future(asyncio.to_thread(self._hold, name))
                try:
                    served = await asyncio.shield(holding)
                    break
                except NoSlotError:
                    await asyncio.sleep(PAUSE)
                except asyncio.CancelledError:  # the client has gone, but the thread goes on
                    holding.add_done_callback(self._let_go)
                    raise
        try:
            yield served
        finally:
            self.pool.release([served.key])

    def _let_go(self, holding: asyncio.Future[Served]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self.pool.release([holding.result().key])

    def _hold(self, name: str) -> Served:
        with self._lock:
            served = self._served[self.base] if name in (self.base, ALIAS) else self._adapter(name)
            self.pool.hold(served.key)
            return served

    def _adapter(self, name: str) -> Served:
        place, served = self._place(name), self._served.get(name)
        if place is None:
            known = [self.base, ALIAS, *self._places()]
            raise refusal(404, f"the model {name!r} does not exist{nearest(name, known)}", "model_not_found")
        state = _state(place)
        try:
            if served is None or served.state != state:
                served = self._read(name, place, state)
            elif served.key not in self.pool.names:  # it had to leave its slot
                self.pool.load(served.key, place)
        except NoSlotError:
            raise
        except Exception as error:  # whatever is wrong with this adapter, the others are served
            reason = f"the adapter {name!r} can't be served: {str(error).replace(str(place), name)}"
            logger.warning("%s", reason)
            raise refusal(422, reason, "adapter_refused") from error
        return served

    def _read(self, name: str, place: Path, state: Any) -> Served:
        key = f"{name}@{next(self._numbers)}"
        self.pool.load(key, place)
        before, self._served[name] = self._served.get(name), self._as_served(name, key, state, place)
        if before is not None:
            with suppress(ConfigError):  # requests run with it: it leaves its slot like any other
                self.pool.unload(before.key)
        logger.info("%s is served", name)
        return self._served[name]

    def _places(self) -> dict[str, Path]:
        names = sorted(entry.name for entry in self.folder.iterdir())
        return {name: place for name in names if (place := self._place(name)) is not None}

    def _place(self, name: str) -> Path | None:
        """The folder that has all files of the adapter of this name; None if there is none."""
        if name.startswith(".") or name in (self.base, ALIAS):  # a hidden one may be being written
            return None
        with suppress(OSError):  # such as a name that is too long
            entry = folder_in(self.folder, name)
            for place in () if entry is None else (entry, RunFolder(entry).adapter):
                if all((place / file).is_file() for file in FILES):
                    return place
        return None

    def _as_served(self, name: str, key: str, state: Any, place: Path | None) -> Served:
        tokenizer = copy.copy(self.tokenizer)
        ends: Any = copy.deepcopy(self.pool.base.generation_config)
        try:
            tokenizer.chat_template = chat_template(tokenizer, self.tokenizer.chat_template, place)
            stop_at_turns_end(SimpleNamespace(generation_config=ends), tokenizer)  # type: ignore[arg-type]
        except DataError:  # it has none, so that it can only complete texts
            tokenizer.chat_template = None
        return Served(name, key, state, tokenizer, ends.eos_token_id)


def _state(place: Path) -> tuple[tuple[int, int, int], ...]:
    found = [(place / file).stat() for file in FILES]
    return tuple((file.st_mtime_ns, file.st_size, file.st_ino) for file in found)
