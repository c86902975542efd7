"""Errors as OpenAI clients know them: one nested JSON object and a meaningful status.

Knows how halfweave's errors become statuses. Knows nothing of routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import CapacityError, EngineDeadError, NoProcessError, RequestError

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
]
UNSUPPORTED = "unsupported_parameter"
_MAX_MESSAGE_CHARS = 400
_RETRY_AFTER_S = "1"


class ErrorDetail(BaseModel):
    """What went wrong: for people, by kind, by field, and for programs."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than the one asked for.

    It is an `HTTPException` so that FastAPI lets it through while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    def answer(self) -> ErrorAnswer:
        """The error as a JSON document."""
        return ErrorAnswer(
            error=ErrorDetail(
                message=_bounded(self.detail),
                type=_type_of(self.status_code),
                param=None if self.param is None else _bounded(self.param),
                code=self.code,
            )
        )


def error_response(error: ApiError) -> Response:
    """The error as an HTTP answer."""
    body = json.dumps(error.answer().model_dump())
    return Response(body, error.status_code, error.headers, media_type="application/json")


def to_api_error(error: Exception) -> ApiError:
    """Translate any exception; what is not known to be harmless becomes a bare 500."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _from_http(error)
        case RequestError():
            return ApiError(400, error.message, code=error.code, param=error.param)
        case NoProcessError():
            return unavailable(error.message, "no_process")
        case CapacityError():
            retry = {"Retry-After": _RETRY_AFTER_S}
            return ApiError(429, error.message, code="queue_full", headers=retry)
        case EngineDeadError():
            return unavailable("the engine has stopped", "engine_dead", retry=False)
        case _:
            return ApiError(500, "internal error", code="internal_error")


def unavailable(message: str, code: str, *, retry: bool = True) -> ApiError:
    """503. `retry` tells the official clients whether asking this server again can help."""
    headers = {"Retry-After": _RETRY_AFTER_S, "x-should-retry": str(retry).lower()}
    return ApiError(503, message, code=code, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected error of `app` in the nested shape; others are left to propagate."""

    async def handle(_: Request, error: Exception) -> Response:
        return error_response(to_api_error(error))

    expected = (
        HTTPException,
        RequestValidationError,
        RequestError,
        CapacityError,
        EngineDeadError,
    )
    for kind in expected:
        app.add_exception_handler(kind, handle)


def _type_of(status: int) -> ErrorType:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _from_http(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this URL", code="unknown_url")
    if error.status_code == 405:
        message = "this URL does not answer this method"
        return ApiError(405, message, code="method_not_supported", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """The first thing wrong with a body; a list of everything could outgrow the request."""
    first = errors[0]
    param = _param(first["loc"])
    if param is None:
        return ApiError(400, f"the request body is not usable: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not a known parameter", code=UNSUPPORTED, param=param)
    code = UNSUPPORTED if first["type"] == UNSUPPORTED else None
    return ApiError(400, f"{param}: {first['msg']}", code=code, param=param)


def _param(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "<parts>", "role")` -> `messages[0].role`.

    Parts in angle brackets name a branch of a union, which the client never wrote.
    """
    name = ""
    for part in loc[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("<"):
            name += f".{part}" if name else part
    return name or None


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[:_MAX_MESSAGE_CHARS] + "..."
