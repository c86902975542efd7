"""What surrounds every HTTP request: its id, its line in the log, and the last line of defence.

Never logs anything a client wrote except a request id of harmless characters.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .record import Record, begin_record
from .service import Activity

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RequestScope:
    """ASGI middleware, to be put around everything else."""

    def __init__(self, app: ASGIApp, activity: Activity, max_headers: int) -> None:
        self._app, self._activity, self._max_headers = app, activity, max_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._activity.in_flight += 1
        answering = _Answering(_request_id(scope), send, begin_record(scope))
        try:
            await self._answer(scope, receive, answering)
        finally:
            answering.log(scope)
            self._activity.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, answering: _Answering) -> None:
        if len(scope["headers"]) > self._max_headers:
            message = f"the request has over {self._max_headers} headers"
            too_many = ApiError(
                431, message, code="request_too_large", headers={"Connection": "close"}
            )
            await error_response(too_many)(scope, receive, answering.send)
            return
        try:
            await self._app(scope, receive, answering.send)
        except Exception:
            _log.exception("request %s failed", answering.request_id)
            if answering.status is not None:
                raise  # too late for a status: the server cuts the connection
            message = f"internal error; the log has more under request id {answering.request_id}"
            response = error_response(ApiError(500, message, code="internal_error"))
            await response(scope, receive, answering.send)


class _Answering:
    """One answer on its way out."""

    def __init__(self, request_id: str, send: Send, record: Record) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._record = record
        self._send = send
        self._started = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
        await self._send(message)

    def log(self, scope: Scope) -> None:
        route = _route(scope)
        line = {
            "request_id": self.request_id,
            "method": None if route is None else scope["method"],
            "route": route,
            "status": self.status,
            "ms": round(1000 * (time.monotonic() - self._started), 1),
            **self._record.line(),
        }
        _log.info("%s", json.dumps(line))


def _route(scope: Scope) -> str | None:
    """The pattern that the URL matched; never the URL, which is the client's own text."""
    path: str | None = getattr(scope.get("route"), "path", None)
    prefix = "/v1" if scope["path"].startswith("/v1/") else ""
    return path if path is None or path.startswith(prefix) else prefix + path


def _request_id(scope: Scope) -> str:
    """The client's own id where it is harmless, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
