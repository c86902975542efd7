"""What Ray's proxies answer by themselves, in the API's shape.

They load this file, so it imports neither torch nor ray.
"""

from __future__ import annotations

import json
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response, unavailable

REPLICA, _REQUEST_ID = "x-halfweave-replica", "x-request-id"
_HARMLESS = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as in request_scope.py, which loads torch
_log = logging.getLogger(__name__)


def proxy_middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves."""
    return [Middleware(_RayAnswers)]


class _RayAnswers:
    """ASGI middleware: what Ray answers without a replica, or not at all, has the API's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own routes
            await self._app(scope, receive, send)
            return
        answer = _Answer(receive, send)
        await self._app(scope, answer.receive, answer.send)
        await answer.finish(scope)


class _Answer:
    """One answer on its way out of a proxy: a replica's passes, Ray's is replaced."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._status: int | None = None
        self._signed = self._events = self._whole = self._left = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._status, self._signed = message["status"], REPLICA in headers
            self._events = headers.get("content-type", "").startswith("text/event-stream")
            headers[_REQUEST_ID] = headers.get(_REQUEST_ID, "")  # Ray adds it a second time
        elif message["type"] == "http.response.body":
            self._whole = not message.get("more_body", False)
        if self._signed:
            await self._send(message)

    async def finish(self, scope: Scope) -> None:
        """Answer in the replica's place if it did not, or not to the end, and somebody waits."""
        if self._left or (self._signed and self._whole):
            return
        error = _without_replica(None if self._signed else self._status)
        given = Headers(scope=scope).get(_REQUEST_ID, "")
        request_id = given if _HARMLESS.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        line = {"request_id": request_id, "status": error.status_code, "code": error.code}
        _log.warning("%s", json.dumps(line))
        if not self._signed:
            response = error_response(error)
            response.headers[_REQUEST_ID] = request_id
            await response(scope, self._receive, self._send)
        elif self._events:
            event = f"data: {json.dumps(error.answer().model_dump())}\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})


def _without_replica(status: int | None) -> ApiError:
    """What a client is told, given what Ray would have answered."""
    match status:
        case 408:
            return ApiError(408, "the request took longer than it allows", code="timeout")
        case 429:
            retry = {"Retry-After": "1"}
            return ApiError(429, "all replicas are busy", code="queue_full", headers=retry)
        case 404 | 503:
            return unavailable("no replica takes requests", "no_replica")
        case _:
            return unavailable("the replica died while it worked on this", "replica_died")
