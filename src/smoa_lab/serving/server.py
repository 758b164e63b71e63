"""Serves the adapters of a folder by OpenAI's protocol, on the app, handlers and continuous batching of ``transformers
serve``: ``smoa serve``. A request's ``model`` is the name of a folder or of the base."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import ContinuousBatchingConfig

from smoa import AdapterPool
from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import load_base_model, to_device
from smoa_lab.config.run import ModelSection
from smoa_lab.serving.adapters import Adapters
from smoa_lab.serving.app import app_of
from smoa_lab.serving.batching import PoolManager, running
from smoa_lab.serving.requests import answer

logger = logging.getLogger(__name__)

CACHE_TOKENS, PAGE, STEP, REQUESTS = 8192, 32, 512, 256
"""On a CPU: tokens for which the cache has room, tokens of a block of it, and tokens and requests of a step."""


@dataclass(frozen=True)
class Settings:
    """How to serve: ``slots`` is the most adapters that are held at once, ``cache_tokens`` counts those of all requests
    for whose keys and values there is room, by default 8,192 on a CPU and what the memory holds on a GPU."""

    slots: int = 64
    api_key: str | None = None
    max_request_bytes: int = 4 << 20
    cache_tokens: int | None = None


def serve(base: ModelSection, folder: Path, host: str, port: int, settings: Settings) -> None:
    """Serve until Ctrl-C."""
    if not folder.is_dir():
        raise ConfigError(f"--adapters {folder}: is no folder; name the one in which each adapter has a folder")
    if settings.api_key is not None and not settings.api_key.strip():
        raise ConfigError("--api-key: is empty; give a key, or unset SMOA_API_KEY to let everyone ask")
    with listening(host, port) as place:
        if settings.api_key is None and not host.startswith("127.") and host not in ("localhost", "::1"):
            logger.warning("Whoever reaches %s can use this server: no --api-key is set", host)
        model, tokenizer = load_base_model(base)
        to_device(model)
        with suppress(KeyboardInterrupt), serving(model, tokenizer, base.name, folder, settings) as app:
            logger.info("http://%s:%s/v1 serves %s with the adapters in %s", host, port, base.name, folder)
            logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of each request
            config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2)
            uvicorn.Server(config).run(sockets=[place])


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to this address; raises ConfigError if it can't be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
            yield place
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error


@contextmanager
def serving(model: Any, tokenizer: Any, name: str, folder: Path, settings: Settings) -> Iterator[ASGIApp]:
    """The app that serves a loaded base, by its name, and the adapters of a folder."""
    if not hasattr(model, "init_continuous_batching"):
        raise DataError(f"{name}: transformers has no continuous batching for a {type(model).__name__}")
    pool = AdapterPool(model, slots=settings.slots)
    tokens, config = settings.cache_tokens, ContinuousBatchingConfig(auto_switch_to_flash=False)
    if model.device.type == "cpu":
        tokens = tokens or CACHE_TOKENS
        config.page_size, config.max_batch_tokens, config.max_requests_per_batch = PAGE, STEP, REQUESTS
    if tokens is not None:
        config.num_blocks = -(-tokens // config.page_size)
    with running(pool, model.generation_config, config) as manager:
        adapters = Adapters(pool, tokenizer, name, folder)
        yield Guard(app_of(adapters, manager), manager, settings)


class Guard:
    """Before the app: the key, the size of requests, names of requests that nobody can guess or use twice; and a
    request ends when its client has gone."""

    def __init__(self, app: ASGIApp, manager: PoolManager, settings: Settings) -> None:
        self.app, self.manager, self.settings = app, manager, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, limit = dict(scope["headers"]), self.settings.max_request_bytes
        if scope["path"] != "/health" and not self._may(headers):
            await answer(401, "the API key is missing or wrong: send Authorization: Bearer KEY")(scope, receive, send)
            return
        if b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > limit:
            await answer(413, f"a request states its length, and may have {limit} bytes")(scope, receive, send)
            return
        request_id, whole, gone = uuid.uuid4().hex, asyncio.Event(), asyncio.Event()
        scope = {**scope, "headers": [*({**headers, b"x-request-id": request_id.encode()}).items()]}

        async def read() -> Message:
            if whole.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            part = await receive()
            if not part.get("more_body"):
                whole.set()
            return part

        async def watch() -> None:
            await whole.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work, watcher = asyncio.ensure_future(self.app(scope, read, send)), asyncio.ensure_future(watch())
        with suppress(asyncio.CancelledError):  # the server ends
            try:
                await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    await work
            finally:
                watcher.cancel()
                with self.manager.output_router._lock:
                    self.manager.output_router.result_handlers.pop(request_id, None)
                if not work.done():
                    work.cancel()
                    self.manager.cancel_request(request_id)
                    await asyncio.wait((work,))

    def _may(self, headers: dict[bytes, bytes]) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.settings.api_key.encode())
