"""Serves the adapters of a folder by OpenAI's protocol, on the app, handlers and continuous batching of ``transformers
serve``: ``smoa serve``.

A request's ``model`` is the name of a folder or of the base. No request makes the server load another model: the
routes of transformers' app that would are taken off, and its model manager has this one base.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import json
import logging
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import torch
import transformers
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import ContinuousBatchingConfig, GenerationConfig

from smoa import AdapterPool
from smoa.errors import ConfigError, DataError, UnsupportedVersionError, nearest
from smoa.tuner.batching import TRIED, PoolManager
from smoa.tuner.generation import BASE
from smoa.tuner.shelves import NoSlotError
from smoa_lab.base_models import load_base_model
from smoa_lab.basics.positions import positions_of
from smoa_lab.chat import chat_template
from smoa_lab.config.run import ModelSection
from smoa_lab.data.chat_templates import stop_at_turns_end
from smoa_lab.data.rows import Template
from smoa_lab.open_run import trained_template
from smoa_lab.training.run_folder import RunFolder

try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager, CBWorkerDeadError, GenerationState
except ImportError as error:
    raise UnsupportedVersionError(
        f"smoa serve: the server of transformers {transformers.__version__} lacks a part of it ({error}); it was tried "
        f"with transformers {', '.join(TRIED)}"
    ) from error

logger = logging.getLogger(__name__)

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""What is served of transformers' app."""
ALIAS = "base"
"""The base's other name."""
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
"""What an adapter's folder has to have."""
CACHE_TOKENS, PAGE, STEP, REQUESTS = 8192, 32, 512, 256
"""On a CPU: tokens for which the cache has room, tokens of a block of it and of a step, and requests of a step."""
GREEDY = 1e-5
"""Below this temperature the greatest logit is taken: divided by less, logits overflow."""
PAUSE = 0.02
"""Seconds between two looks for a free slot."""


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Args:
        slots: The most adapters that are held at once.
        api_key: What requests must bring, if anything.
        max_request_bytes: The largest body of a request.
        cache_tokens: Tokens of all requests for whose keys and values there is room; by default 8,192 on a CPU and what
            the memory holds on a GPU.
    """

    slots: int = 64
    api_key: str | None = None
    max_request_bytes: int = 4 << 20
    cache_tokens: int | None = None


def serve(base: ModelSection, folder: Path, host: str, port: int, settings: Settings) -> None:
    """Serve until Ctrl-C.

    Raises:
        ConfigError: there is no such folder, or the port is in use.
        DataError: the base cannot be loaded, or not be served so.
    """
    if not folder.is_dir():
        raise ConfigError(f"--adapters {folder}: is no folder; name the one in which each adapter has a folder")
    if settings.api_key is not None and not settings.api_key.strip():
        raise ConfigError("--api-key: is empty; give a key, or unset SMOA_API_KEY to let everyone ask")
    with listening(host, port) as place:
        if settings.api_key is None and not host.startswith("127.") and host not in ("localhost", "::1"):
            logger.warning("Whoever reaches %s can use this server: no --api-key is set", host)
        model, tokenizer = load_base_model(base)
        if torch.cuda.is_available() and not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
            model.to("cuda")  # type: ignore[arg-type]
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
    """The app that serves a loaded base, by its name, and the adapters of a folder.

    Raises:
        DataError: transformers can't batch the requests of such a model.
    """
    if not hasattr(model, "init_continuous_batching"):
        raise DataError(f"{name}: transformers has no continuous batching for a {type(model).__name__}")
    pool = AdapterPool(model, slots=settings.slots)
    tokens, config = settings.cache_tokens, ContinuousBatchingConfig(auto_switch_to_flash=False)
    if model.device.type == "cpu":
        tokens = tokens or CACHE_TOKENS
        config.page_size, config.max_batch_tokens, config.max_requests_per_batch = PAGE, STEP, REQUESTS
    if tokens is not None:
        config.num_blocks = -(-tokens // config.page_size)
    with pool.continuous_batching(model.generation_config, config, own_configs=True) as manager:
        adapters = Adapters(pool, tokenizer, name, folder)
        yield Guard(_app(adapters, manager), manager, settings)


# The adapters.


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
    keep the adapter that they began with.

    Args:
        pool: Holds them. Nobody else loads into it.
        tokenizer: The base's.
        base: The base's name.
        folder: Where they are.
    """

    def __init__(self, pool: AdapterPool, tokenizer: Any, base: str, folder: Path) -> None:
        self.pool, self.tokenizer, self.base, self.folder = pool, tokenizer, base, folder
        self._lock, self._turn, self._numbers = threading.Lock(), asyncio.Lock(), count(1)
        self._served = {base: self._as_served(base, BASE, None, None, "chat")}
        self._refused: dict[str, tuple[Any, str]] = {}

    def listed(self) -> list[dict[str, Any]]:
        """The base and all adapters, as ``/v1/models`` has them, without those that were refused."""
        found = [{"id": self.base, "object": "model", "created": 0, "owned_by": "smoa"}]
        for name, place in self._places().items():
            with suppress(OSError):
                state = _state(place)
                if self._refused.get(name, (None, ""))[0] != state:
                    created = int(state[0][0] // 1e9)
                    found.append({"id": name, "object": "model", "created": created, "owned_by": "smoa"})
        return found

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[Served]:
        """The adapter of a name, in a slot of the pool until the context ends; waits while all slots are in use. Who
        came first is served first, so that adapters with many requests keep nobody out.

        Raises:
            HTTPException: there is none (404), or it can't be served (422).
        """
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
            self.pool._release([served.key])

    def _let_go(self, holding: asyncio.Future[Served]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self.pool._release([holding.result().key])

    def _hold(self, name: str) -> Served:
        with self._lock:
            served = self._served[self.base] if name in (self.base, ALIAS) else self._adapter(name)
            self.pool._hold(served.key)
            return served

    def _adapter(self, name: str) -> Served:
        places = self._places()
        if name not in places:
            known = [self.base, ALIAS, *places]
            raise _refusal(404, f"the model {name!r} does not exist{nearest(name, known)}", "model_not_found")
        place, served = places[name], self._served.get(name)
        try:
            state = _state(place)
            refused = self._refused.get(name)
            if refused is not None and refused[0] == state:
                raise AdapterError(refused[1])
            if served is None or served.state != state:
                served = self._read(name, place, state)
            elif served.key not in self.pool.names:  # it had to leave its slot
                self.pool.load(served.key, place)
        except NoSlotError:
            raise
        except Exception as error:  # whatever is wrong with this adapter, the others are served
            reason = str(error).replace(f"{place}", name)
            if not isinstance(error, AdapterError | OSError | MemoryError):  # these may pass
                self._refused[name] = state, reason
                logger.warning("%s is not served: %s", name, reason)
            raise _refusal(422, f"the adapter {name!r} can't be served: {reason}", "adapter_refused") from error
        return served

    def _read(self, name: str, place: Path, state: Any) -> Served:
        key = f"{name}@{next(self._numbers)}"
        self.pool.load(key, place)
        if _state(place) != state:
            self.pool.unload(key)
            raise AdapterError("it is being written; ask again")
        run = self.folder / name
        template = trained_template(run) if RunFolder(run).finished else "chat"
        before, self._served[name] = self._served.get(name), self._as_served(name, key, state, place, template)
        if before is not None:
            with suppress(ConfigError):  # requests run with it: it leaves its slot like any other
                self.pool.unload(before.key)
        logger.info("%s is served", name)
        return self._served[name]

    def _places(self) -> dict[str, Path]:
        """The folders that have all files of an adapter, by name."""
        found = {}
        for entry in sorted(self.folder.glob("[!.]*")):  # a hidden one may be one that is being written
            for place in (entry, entry / "adapter"):
                if all((place / file).is_file() for file in FILES) and entry.name not in (self.base, ALIAS):
                    found[entry.name] = place
                    break
        return found

    def _as_served(self, name: str, key: str, state: Any, place: Path | None, template: Template) -> Served:
        tokenizer = copy.copy(self.tokenizer)
        ends: Any = copy.deepcopy(self.pool.base.generation_config)
        try:
            tokenizer.chat_template = chat_template(tokenizer, self.tokenizer.chat_template, place, template)
            stop_at_turns_end(SimpleNamespace(generation_config=ends), tokenizer)  # type: ignore[arg-type]
        except DataError:  # it has none, so that it can only complete texts
            tokenizer.chat_template = None
        return Served(name, key, state, tokenizer, ends.eos_token_id)


class AdapterError(ValueError):
    """Why an adapter isn't served at this moment."""


def _state(place: Path) -> tuple[tuple[int, int, int], ...]:
    found = [(place / file).stat() for file in FILES]
    return tuple((file.st_mtime_ns, file.st_size, file.st_ino) for file in found)


# What a request may ask. All else is refused, so that nothing is ignored in silence.


class Part(BaseModel):
    """A piece of a message: text."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message, and what else its chat template may want."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None


class Asked(BaseModel):
    """The fields of both kinds of requests."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stream: bool | None = None


class AskedChat(Asked):
    """Those of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logit_bias: dict[int, float] | None = None
    tools: list[dict[str, Any]] | None = None


class AskedText(Asked):
    """Those of ``/v1/completions``."""

    prompt: str
    suffix: str | None = None


HARMLESS = ("metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user")
"""Fields that may have any value, for they change no answer."""
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "stop": [],
    "tool_choice": "auto",
}
"""Fields that are taken with this value only, which some clients send."""


def _checked(body: dict[str, Any], kind: type[Asked]) -> dict[str, Any]:
    for field, value in body.items():
        same = (
            field in NEUTRAL and value == NEUTRAL[field] and isinstance(value, bool) == isinstance(NEUTRAL[field], bool)
        )
        if not (field in kind.model_fields or field in HARMLESS or value is None or same):
            shown = json.dumps(value)[:100]
            raise _refusal(400, f"{field}={shown} is not supported by this server; leave it out", "unsupported", field)
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _refusal(400, f"{place}: {first['msg']}", "invalid_value", place) from error
    return {field: value for field, value in asked.model_dump(exclude_none=True).items() if value != {}}


# transformers' app, with one base and many adapters.

_SERVED: ContextVar[Served] = ContextVar("smoa_served")
"""What the request of this task asks for."""


class _Models(ModelManager):
    """transformers' model manager, which loads nothing: the base is there."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return self.adapters.listed()

    def shutdown(self) -> None:
        pass  # `serving` ends what it began


class _State(GenerationState):
    def __init__(self, manager: PoolManager) -> None:
        super().__init__(continuous_batching=True)
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> CBGenerateManager:
        return _OfRequest(self.manager, _SERVED.get().key)

    def is_cb_alive(self) -> bool:
        return self.manager.background_thread_status.fatal_error is None


class _OfRequest(CBGenerateManager):
    """transformers' manager of what is generated, for one request."""

    def __init__(self, manager: PoolManager, key: str) -> None:
        super().__init__()
        self._cb: Any = _Bound(manager, key)

    def init_cb(self, model: Any, gen_config: GenerationConfig) -> None:
        self._cb.config = gen_config


class _Bound:
    """The running manager, whose `add_request` knows the adapter and the config of one request."""

    config: Any

    def __init__(self, manager: PoolManager, key: str) -> None:
        self._manager, self._key = manager, key
        self._start: Callable[[], object] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def add_request(self, input_ids: list[int], request_id: str, streaming: bool, **options: Any) -> str:
        limits = (self._manager.capacity, positions_of(self._manager.model.config))
        limit = min(limit for limit in limits if limit is not None)
        room, config = limit - len(input_ids), self.config
        if not input_ids or room < (config.max_new_tokens if config.asked else 1):
            raise _refusal(
                400,
                f"{len(input_ids)} tokens, and {config.max_new_tokens} to generate: must be at least one, and at most "
                f"{limit} together",
                "context_length_exceeded",
            )
        options["max_new_tokens"] = config.max_new_tokens = min(config.max_new_tokens, room)
        start = partial(
            self._manager.add_request,
            input_ids,
            request_id,
            streaming=streaming,
            adapter=self._key,
            generation_config=config,
            seed=config.seed,
            **options,
        )
        if streaming:
            self._start = start  # a stream's handler comes after its request: till then nothing may be written
        else:
            start()
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable[..., None]) -> None:
        self._manager.register_result_handler(request_id, callback)
        if self._start is not None:
            self._start()


class _Handler(BaseHandler):
    """Checks a request, and holds its adapter while it begins."""

    asked: ClassVar[type[Asked]]
    model_manager: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        taken = _checked(body, self.asked)
        async with self.model_manager.adapters.held(taken["model"]) as served:
            token = _SERVED.set(served)
            try:
                if self.asked is AskedChat and served.tokenizer.chat_template is None:
                    raise _refusal(400, f"{served.name} has no chat template; use /v1/completions", "no_chat_template")
                return await super().handle_request(taken, request_id)  # type: ignore[misc]
            except TemplateError as error:
                raise _refusal(400, f"the chat template refuses this: {error}", "invalid_value") from error
            except ConfigError as error:
                raise _refusal(400, str(error), "invalid_value") from error
            finally:
                _SERVED.reset(token)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served = _SERVED.get()
        return served.name, self.model_manager.adapters.pool.base, served.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **options: Any) -> GenerationConfig:
        seed = body.pop("seed", None)  # transformers would seed all requests by it
        config: Any = super()._build_generation_config(body, *args, **options)
        if "temperature" in body or "top_p" in body:
            config.do_sample = body.get("temperature", 1) >= GREEDY
        config.seed, config.asked = seed, "max_tokens" in body or "max_completion_tokens" in body
        if self.asked is AskedChat:
            config.eos_token_id = _SERVED.get().ends
        return cast(GenerationConfig, config)


class _Chat(_Handler, ChatCompletionHandler):
    asked = AskedChat


class _Completion(_Handler, CompletionHandler):
    asked = AskedText


def _app(adapters: Adapters, manager: PoolManager) -> FastAPI:
    models, state = _Models(adapters), _State(manager)
    unused: Any = None
    app = build_server(models, _Chat(models, state), _Completion(models, state), unused, unused, unused, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    def refused(_: Any, error: Exception) -> JSONResponse:
        if isinstance(error, StarletteHTTPException):
            return _answer(error.status_code, error.detail)
        if isinstance(error, RequestValidationError):
            return _answer(400, "the body must be a JSON object")
        if isinstance(error, CBWorkerDeadError):
            return _answer(503, f"generation has failed, start the server again: {error}")
        return _answer(500, f"{type(error).__name__}: {error}")

    for kind in (StarletteHTTPException, RequestValidationError, CBWorkerDeadError, Exception):
        app.add_exception_handler(kind, refused)
    return app


def _refusal(status: int, message: str, code: str, param: str | None = None) -> HTTPException:
    return HTTPException(status, {"message": message, "code": code, "param": param})


def _answer(status: int, detail: Any) -> JSONResponse:
    """An error as OpenAI has it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    found = detail if isinstance(detail, dict) else {"message": str(detail), "code": None, "param": None}
    return JSONResponse({"error": {"type": kind, **found}}, status)


class Guard:
    """Before the app: the key, the size of requests, names of requests that nobody can guess or use twice; and a
    request ends when its client has gone.

    Args:
        app: What it guards.
        manager: What generates.
        settings: The key and the size.
    """

    def __init__(self, app: ASGIApp, manager: PoolManager, settings: Settings) -> None:
        self.app, self.manager, self.settings = app, manager, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] != "/health" and not self._may(scope):
            await _answer(401, "the API key is missing or wrong: send Authorization: Bearer KEY")(scope, receive, send)
            return
        body = await self._body(scope, receive)
        if body is None:
            limit = self.settings.max_request_bytes
            await _answer(413, f"a request may have {limit} bytes at most")(scope, receive, send)
            return
        request_id, gone = uuid.uuid4().hex, asyncio.Event()
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        scope = {**scope, "headers": [*headers, (b"x-request-id", request_id.encode())]}
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            part = next(parts, None)
            if part is None:
                await gone.wait()
            return part or {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work, watcher = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            watcher.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
                self.manager.cancel_request(request_id)
            with self.manager.output_router._lock:
                self.manager.output_router.result_handlers.pop(request_id, None)

    def _may(self, scope: Scope) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.settings.api_key.encode())

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None if it is too large."""
        limit, body = self.settings.max_request_bytes, bytearray()
        with suppress(ValueError):
            if int(dict(scope["headers"]).get(b"content-length", b"0")) > limit:
                return None
        while True:
            part = await receive()
            body += part.get("body", b"")
            if len(body) > limit:
                return None
            if not part.get("more_body"):
                return bytes(body)
