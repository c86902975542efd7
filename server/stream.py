"""Server-sent events: chunks into bytes, and errors where no status can carry them any more.

Knows framing and the order of chunks, not what a chunk looks like: see `Chunks`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ..runtime.request import Event, Finished
from .engine_call import EngineCall
from .errors import to_api_error
from .settings import ServerSettings

_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


class Chunks(Protocol):
    """Makes the chunks of one kind of answer."""

    def first(self, index: int) -> BaseModel | None:
        """What a choice begins with, if anything."""

    def event(self, index: int, event: Event) -> Sequence[BaseModel]:
        """What an event of a choice adds."""

    def usage(self, ends: Sequence[Finished]) -> BaseModel | None:
        """The end of everything, if the client asked for it."""


class EventStream(StreamingResponse):
    """Streams an engine call. However the response ends, the call is closed."""

    def __init__(self, call: EngineCall, chunks: Chunks, settings: ServerSettings) -> None:
        super().__init__(
            _frames(call, chunks, settings.ping_s),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._call, self._send_timeout_s = call, settings.send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            self._call.close()


async def _frames(call: EngineCall, chunks: Chunks, ping_s: float) -> AsyncIterator[bytes]:
    try:
        async for chunk in _chunks(call, chunks, ping_s):
            yield _PING if chunk is None else _event(chunk.model_dump_json(exclude_unset=True))
    except Exception as error:
        known = to_api_error(error)
        if known.status_code == 500:
            _log.error("a stream failed", exc_info=error)
        yield _event(json.dumps(known.answer().model_dump()))
    yield _DONE


async def _chunks(
    call: EngineCall, chunks: Chunks, ping_s: float
) -> AsyncIterator[BaseModel | None]:
    for index in range(call.size):
        if (first := chunks.first(index)) is not None:
            yield first
    ends: dict[int, Finished] = {}
    async for item in call.events(ping_s):
        if item is None:
            yield None
            continue
        index, event = item
        if isinstance(event, Finished):
            ends[index] = event
        for chunk in chunks.event(index, event):
            yield chunk
    if (usage := chunks.usage([ends[index] for index in sorted(ends)])) is not None:
        yield usage


def _event(document: str) -> bytes:
    """One event. JSON has no raw line breaks, so one line is enough."""
    return f"data: {document}\n\n".encode()
