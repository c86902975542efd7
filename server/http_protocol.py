"""HTTP on one connection: uvicorn's, with limits on how large a head is and how long all takes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import sys
import termios
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

_REST_S = 2.0
_NO_LINGER = struct.pack("ii", 1, 0)


class BoundedHttp(H11Protocol):
    """As H11Protocol; errors that come before a request is whole have the API's shape too.

    A request may be answered before its body is whole. What is left of the body is dropped, and a
    connection on which it does not end soon is closed. So is one whose client takes nothing.
    """

    def __init__(
        self, header_timeout_s: float, send_timeout_s: float, *given: Any, **named: Any
    ) -> None:
        super().__init__(*given, **named)
        self._header_timeout_s, self._send_timeout_s = header_timeout_s, send_timeout_s
        self._late: asyncio.TimerHandle | None = None
        self._begun = self._drops_rest = False
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there, and has so long to say what they want."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of any unsent byte
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """A first byte after an answer begins a new head, or is of a body nobody waits for."""
        before = self.cycle
        if self._late is None and (before is None or before.response_complete):
            self._expect_head()
        self._begun = True
        super().data_received(data)
        if self.cycle is not before:
            self._forget_head()
        elif self._drops_rest and self.conn.our_state is h11.IDLE:
            self._forget_head()  # the body has ended, and the connection is as good as new
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._forget_head()
        self._forget_stuck()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer has been given."""
        super().on_response_complete()
        if self._answered_early and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._forget_head()
            self._drops_rest = True
            self._late = self.loop.call_later(_REST_S, self._give_up)

    def pause_writing(self) -> None:
        """There are bytes that the client has not taken."""
        super().pause_writing()
        self._watch(_unsent(self.transport))

    def resume_writing(self) -> None:
        """The client has taken everything."""
        self._forget_stuck()
        super().resume_writing()

    def shutdown(self) -> None:
        """The server stops: end now, or after the answer that is being given."""
        if self._answered_early:
            self.transport.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and heads that are too large. Called as h11 raises."""
        raised = sys.exception()
        status = getattr(raised, "error_status_hint", 400)
        if status == 431:
            error = ApiError(431, "the request's head is too large", code="request_too_large")
        else:
            error = ApiError(400, "the request is no HTTP that this server understands")
        self._answer(error)

    @property
    def _answered_early(self) -> bool:
        """Whether an answer has been given to a request whose body is not whole."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is not h11.DONE

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self._header_timeout_s, self._give_up)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late, self._begun, self._drops_rest = None, False, False

    def _give_up(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self._begun and not self._drops_rest:
            self._answer(ApiError(408, "the request did not arrive in time", code="timeout"))
        else:
            # A browser's connection in advance, which wants no answer; or one that has its answer.
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # another answer has begun
            return
        body = json.dumps(error.answer().model_dump()).encode()
        head = h11.Response(
            status_code=error.status_code,
            headers=[
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ],
        )
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _watch(self, unsent: int) -> None:
        self._stuck = self.loop.call_later(self._send_timeout_s, self._check_taken, unsent)

    def _forget_stuck(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _check_taken(self, before: int) -> None:
        """Go on waiting for a slow client; leave one that has taken nothing.

        Closing would wait for it without end, and so would the system with what it has yet to send,
        unless it is told not to.
        """
        unsent = _unsent(self.transport)
        if unsent < before:
            self._watch(unsent)
            return
        self._stuck = None
        with contextlib.suppress(OSError):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes that the client has not taken.

    The system's buffer counts too: it takes more only once much of it is free, so that ours stays
    as it is for long while a slow client reads.
    """
    size = transport.get_write_buffer_size()
    with contextlib.suppress(OSError):
        file = transport.get_extra_info("socket").fileno()
        size += struct.unpack("i", fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)))[0]
    return size


def bounded_http(header_timeout_s: float, send_timeout_s: float) -> Any:
    """What uvicorn makes one of for every connection."""
    return partial(BoundedHttp, header_timeout_s, send_timeout_s)
