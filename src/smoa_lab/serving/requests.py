"""What a request may ask, and errors as OpenAI has them.

A field that this server cannot honor is refused, so that nothing is ignored in silence.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, ValidationError

NotEmpty = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[NotEmpty], Field(max_length=1000), BeforeValidator(lambda one: [one] if isinstance(one, str) else one)
]


class Part(BaseModel):
    """A piece of a message: text."""

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """The function of a call, its arguments as JSON or as an object."""

    name: str
    arguments: Json[dict[str, Any]] | dict[str, Any]


class ToolCall(BaseModel):
    """What the model has called."""

    model_config = ConfigDict(extra="allow")
    function: Function


class ChatMessage(BaseModel):
    """A message, and what else its chat template may want."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None


class Asked(BaseModel):
    """The fields of both kinds of requests."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: Stop | None = None
    stream: bool | None = None
    logit_bias: dict[int, float] | None = None


class AskedChat(Asked):
    """Those of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
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
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
}
"""Fields that are taken with this value only, which some clients send."""


def checked(body: dict[str, Any], kind: type[Asked]) -> dict[str, Any]:
    """The fields of a request; raises HTTPException (400) for one that is wrong or not supported."""
    for field, value in body.items():
        neutral = NEUTRAL.get(field)
        same = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)  # 0 isn't False: logprobs
        if not (field in kind.model_fields or field in HARMLESS or value is None or same):
            shown = json.dumps(value)[:100]
            raise refusal(400, f"{field}={shown} is not supported by this server; leave it out", "unsupported", field)
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise refusal(400, f"{place}: {first['msg']}", "invalid_value", place) from error
    return {field: value for field, value in asked.model_dump(exclude_none=True).items() if value != {}}


def refusal(status: int, message: str, code: str, param: str | None = None) -> HTTPException:
    """The exception that `answer` makes an error of."""
    return HTTPException(status, {"message": message, "code": code, "param": param})


def answer(status: int, detail: Any) -> JSONResponse:
    """An error as OpenAI has it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    found = detail if isinstance(detail, dict) else {"message": str(detail), "code": None, "param": None}
    return JSONResponse({"error": {"type": kind, **found}}, status)
