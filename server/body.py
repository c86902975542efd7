"""Reading a request body: bounded in bytes and seconds, and strictly JSON.

Knows bytes and JSON, not what the document says.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

_DISCARD_S = 2.0
_DISCARD_FACTOR = 8
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes halves of pairs, whole ones too
_MAX_KEYS = 2048  # of one object: each that is wrong would be looked into before the answer


class BodyLimit:
    """ASGI middleware: a body may have `max_bytes` bytes and take `timeout_s` seconds.

    Counts what arrives, so a body without a declared length is bounded too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _BoundedBody(receive, self._max_bytes, self._timeout_s).receive
        await self._app(scope, receive, send)


class _BoundedBody:
    """The body of one request."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._read()
        except TimeoutError:
            raise _closing(408, "the request body did not arrive in time", "timeout") from None
        if self._bytes > self._max_bytes:
            await self._discard()
            text = f"the request body is larger than {self._max_bytes} bytes"
            raise _closing(413, text, "request_too_large")
        return message

    async def _read(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message

    async def _discard(self) -> None:
        """Read on for a moment: a client that is still writing would not see the answer."""
        try:
            async with asyncio.timeout(_DISCARD_S):
                while not self._complete and self._bytes < _DISCARD_FACTOR * self._max_bytes:
                    await self._read()
        except TimeoutError:
            return


class JsonRequest(Request):
    """A request whose body is one JSON document without ambiguities.

    Duplicate keys, NaN and Infinity are refused: readers disagree about what they mean. So is half
    of a surrogate pair, which JSON can escape and no tokenizer can read. A content
    type other than JSON is refused, because a web page may send those here without asking first.
    """

    async def body(self) -> bytes:
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(400, "the content type must be application/json")
        return await super().body()

    async def json(self) -> Any:
        raw = await self.body()
        try:
            text = raw.decode("utf-8")
            document = json.loads(
                text, object_pairs_hook=_checked_object, parse_constant=_no_constant
            )
            if _SURROGATE.search(text):
                _refuse_halves(document)
        except RecursionError:
            raise ApiError(400, "the request body is nested too deeply") from None
        except UnicodeDecodeError:
            raise ApiError(400, "the request body is not UTF-8") from None
        except ValueError as error:
            raise ApiError(400, f"the request body is not JSON: {error}") from None
        return document


class JsonRoute(APIRoute):
    """A route that reads its body as a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _refuse_halves(document: Any) -> None:
    """Refuse a body with half of a surrogate pair, by the field that has it."""
    fields = document.items() if isinstance(document, dict) else [("", document)]
    for name, value in fields:
        try:
            check_whole(name)
            check_whole(value)
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "ignore").decode() or None
            raise ApiError(400, "a text has half of a surrogate pair", param=shown) from None


def check_whole(document: Any) -> None:
    """Raise UnicodeEncodeError if a text in a JSON document has half of a surrogate pair.

    Raises RecursionError if it is nested too deeply to tell.
    """
    json.dumps(document, ensure_ascii=False).encode()


def _closing(status: int, message: str, code: str) -> ApiError:
    """An error after which the rest of the body is not read, so the connection cannot go on."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise ApiError(400, f"an object in the request body has over {_MAX_KEYS} keys")
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object names the same key twice")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
