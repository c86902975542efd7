"""HTTP on one connection: uvicorn's, with limits on what a head may be and how long it may take."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


class BoundedHttp(H11Protocol):
    """As H11Protocol; errors that come before a request is whole have the API's shape too."""

    def __init__(self, header_timeout_s: float, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._header_timeout_s = header_timeout_s
        self._late: asyncio.TimerHandle | None = None
        self._begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there, and has so long to say what they want."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """A first byte after an answer begins a new head."""
        before = self.cycle
        if self._late is None and (before is None or before.response_complete):
            self._expect_head()
        self._begun = True
        super().data_received(data)
        if self.cycle is not before:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and heads that are too large. Called as h11 raises."""
        raised = sys.exception()
        status = getattr(raised, "error_status_hint", 400)
        if status == 431:
            error = ApiError(431, "the request's head is too large", code="request_too_large")
        else:
            error = ApiError(400, "the request is no HTTP that this server understands")
        self._answer(error)

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self._header_timeout_s, self._give_up)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late, self._begun = None, False

    def _give_up(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self._begun:
            self._answer(ApiError(408, "the request did not arrive in time", code="timeout"))
        else:
            self.transport.close()  # a browser's connection in advance, which wants no answer

    def _answer(self, error: ApiError) -> None:
        body = json.dumps(error.answer().model_dump()).encode()
        head = h11.Response(
            status_code=error.status_code,
            headers=[
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ],
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def bounded_http(header_timeout_s: float) -> Any:
    """What uvicorn makes one of for every connection."""
    return partial(BoundedHttp, header_timeout_s)
