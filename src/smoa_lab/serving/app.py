"""transformers' app, handlers and generation managers, with one base and many adapters.

No request makes the server load another model: the routes that would are removed, and the model manager has this one
base.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    BaseHandler,
    CBGenerateManager,
    CBWorkerDeadError,
    GenerationState,
    get_response_template,
)

from smoa.errors import ConfigError
from smoa_lab.base_models import positions_of
from smoa_lab.serving.adapters import Adapters, Served
from smoa_lab.serving.batching import PoolManager
from smoa_lab.serving.requests import Asked, AskedChat, AskedText, answer, checked, refusal
from smoa_lab.serving.stops import Stops, UntilStop

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""What is served of transformers' app."""
GREEDY = 1e-5
"""Below this temperature the greatest logit is taken: divided by less, logits overflow."""

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

    def generate_streaming(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        queue, streamer = super().generate_streaming(*args, **options)
        stops = self._cb.config.stops
        return queue if stops is None else UntilStop(queue, stops, self._stopped), streamer

    async def generate_non_streaming(self, *args: Any, **options: Any) -> tuple[str, int, list[int]]:
        text, length, written = await super().generate_non_streaming(*args, **options)
        stops = self._cb.config.stops
        before = None if stops is None else stops.before(text)
        if before is not None:
            self._stopped()
        return text if before is None else before, length, written

    def _stopped(self) -> None:
        self._cb.config.max_new_tokens = None  # by which transformers would say that the last token was the limit


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
            raise refusal(
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
            stops=config.stops,
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
        taken = checked(body, self.asked)
        async with self.model_manager.adapters.held(taken["model"]) as served:
            token = _SERVED.set(served)
            try:
                if self.asked is AskedChat:
                    self._check_chat(served, "stop" in taken)
                return await super().handle_request(taken, request_id)  # type: ignore[misc]
            except TemplateError as error:
                raise refusal(400, f"the chat template refuses this: {error}", "invalid_value") from error
            except ConfigError as error:
                raise refusal(400, str(error), "invalid_value") from error
            finally:
                _SERVED.reset(token)

    def _check_chat(self, served: Served, stop: bool) -> None:
        if served.tokenizer.chat_template is None:
            raise refusal(400, f"{served.name} has no chat template; use /v1/completions", "no_chat_template")
        if stop and get_response_template(served.tokenizer, self.model_manager.adapters.pool.base):
            raise refusal(400, f"stop: chats with {served.name} are parsed; leave it out", "unsupported", "stop")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served = _SERVED.get()
        return served.name, self.model_manager.adapters.pool.base, served.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **options: Any) -> GenerationConfig:
        seed, stop = body.pop("seed", None), body.pop("stop", [])  # transformers would seed all requests, and not stop
        config: Any = super()._build_generation_config(body, *args, **options)
        if "temperature" in body or "top_p" in body:
            config.do_sample = body.get("temperature", 1) >= GREEDY
        if bias := body.get("logit_bias"):  # transformers reads it in chats only
            config.sequence_bias = {(token,): value for token, value in bias.items()}
        config.seed, config.asked = seed, "max_tokens" in body or "max_completion_tokens" in body
        served = _SERVED.get()
        if self.asked is AskedChat:
            config.eos_token_id = served.ends
        config.stops = Stops(stop, served.tokenizer) if stop else None
        special = served.tokenizer.added_tokens_decoder.items() if stop else ()
        if named := [number for number, token in special if token.special and token.content in stop]:
            ends = config.eos_token_id  # text has no special tokens: such a stop is one more end
            config.eos_token_id = [*(ends if isinstance(ends, list) else [-1 if ends is None else ends]), *named]
        return cast(GenerationConfig, config)


class _Chat(_Handler, ChatCompletionHandler):
    asked = AskedChat


class _Completion(_Handler, CompletionHandler):
    asked = AskedText


def app_of(adapters: Adapters, manager: PoolManager) -> FastAPI:
    """The app that answers for the base and the adapters."""
    models, state = _Models(adapters), _State(manager)
    unused: Any = None
    app = build_server(models, _Chat(models, state), _Completion(models, state), unused, unused, unused, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    def refused(_: Any, error: Exception) -> JSONResponse:
        if isinstance(error, StarletteHTTPException):
            return answer(error.status_code, error.detail)
        if isinstance(error, RequestValidationError):
            return answer(400, "the body must be a JSON object")
        if isinstance(error, CBWorkerDeadError):
            return answer(503, f"generation has failed, start the server again: {error}")
        return answer(500, f"{type(error).__name__}: {error}")

    for kind in (StarletteHTTPException, RequestValidationError, CBWorkerDeadError, Exception):
        app.add_exception_handler(kind, refused)
    return app
