"""One request to an OpenAI-compatible endpoint, and the times at which its answer came.

Bytes are stamped as they are read and understood only when the answer is whole, so that a client of
many requests does little between two reads. HTTP is h11's, on asyncio's sockets: 64 clients of a
full HTTP library take more of two cores than a small model's server does.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import h11

from ..errors import UsageError
from .sse import Answer, EventReader, read_answer

_READ_BYTES = 2**16
_ERROR_CHARS = 300
_FULL = 429
_MOST_BYTES = 64 * 2**20  # of an answer


@dataclass(frozen=True)
class Target:
    """An endpoint: its address with or without /v1, the model to name, and whether to chat.

    `api_key` is sent, and never shown.

    Raises:
        UsageError: the address is none.
    """

    url: str
    model: str
    chat: bool = False
    ignore_eos: bool = True
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        try:
            where = urlsplit(self.url)
            legal = where.scheme in ("http", "https") and bool(where.hostname) and where.port != 0
        except ValueError:
            legal = False
        if not legal or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise UsageError(f"{self.url!r} is no address such as http://127.0.0.1:8000")
        if "@" in where.netloc:
            raise UsageError("an address has no user and no password in it", "--api-key KEY")
        key = self.api_key or ""
        if not (key.isascii() and key.isprintable()) or key != key.strip():
            raise UsageError("the API key has a blank at an end, or what no header can hold")

    def __repr__(self) -> str:
        return f"Target({self.url}, {self.model})"

    @property
    def path(self) -> str:
        """Where requests go."""
        return f"{self._base}/{'chat/completions' if self.chat else 'completions'}"

    @property
    def models_url(self) -> str:
        """Where its models are listed."""
        where = urlsplit(self.url)
        return f"{where.scheme}://{where.netloc}{self._base}/models"

    @property
    def _base(self) -> str:
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1") + "/v1"

    def body(self, prompt: str, max_tokens: int) -> bytes:
        """The request for one answer of so many tokens, greedy."""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        if self.ignore_eos:
            asked["ignore_eos"] = True
        return json.dumps(asked).encode()


@dataclass(frozen=True)
class Observed:
    """One request as its client saw it; times are seconds of the monotonic clock.

    `outcome` is completed, aborted (by this client), refused (429), timed_out or failed; `ended` is
    when that was known. An aborted answer has what had come by then.
    """

    outcome: str
    sent: float
    ended: float
    answer: Answer
    error: str | None = None


async def ask(target: Target, prompt: str, max_tokens: int, hang_up: int | None = None) -> Observed:
    """Send one request, and read its answer; hang up after `hang_up` chunks, if that is not None.

    Whatever goes wrong is in what comes back. The request counts as sent when the connection
    stands and its first byte is written.
    """
    exchange = _Exchange(target, hang_up)
    try:
        async with asyncio.timeout(target.timeout_s):
            return await exchange.run(target.body(prompt, max_tokens))
    except TimeoutError:
        return exchange.ended("timed_out", f"no end after {target.timeout_s:g} s")
    except (OSError, UnicodeError, h11.RemoteProtocolError) as error:
        return exchange.ended("failed", f"{type(error).__name__}: {error}")


class _Exchange:
    """One connection for one request."""

    def __init__(self, target: Target, hang_up: int | None) -> None:
        self._target, self._hang_up = target, hang_up
        self._pieces: list[tuple[float, bytes]] = []
        self._status = 0
        self._sent = time.monotonic()

    def ended(self, outcome: str, error: str | None = None) -> Observed:
        """What there is, with how it ended."""
        answer = read_answer(self._pieces) if self._status == 200 else Answer()
        return Observed(outcome, self._sent, time.monotonic(), answer, error)

    async def run(self, body: bytes) -> Observed:
        where = urlsplit(self._target.url)
        secure = where.scheme == "https"
        port = where.port or (443 if secure else 80)
        context = _trusting() if secure else None
        reader, writer = await asyncio.open_connection(where.hostname, port, ssl=context)
        try:
            connection = h11.Connection(h11.CLIENT)
            request = self._request(connection, where.netloc, body)
            self._sent = time.monotonic()
            writer.write(request)
            await writer.drain()
            whole = await self._read(connection, reader)
        finally:
            writer.close()
        return self._judged(whole)

    def _request(self, connection: h11.Connection, host: str, body: bytes) -> bytes:
        headers = [
            ("Host", host),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Accept", "text/event-stream"),
            ("Connection", "close"),
        ]
        if self._target.api_key:
            headers.append(("Authorization", f"Bearer {self._target.api_key}"))
        head = h11.Request(method="POST", target=self._target.path, headers=headers)
        parts = (head, h11.Data(data=body), h11.EndOfMessage())
        return b"".join(connection.send(part) or b"" for part in parts)

    async def _read(self, connection: h11.Connection, reader: asyncio.StreamReader) -> bool:
        """Read to the end of the answer; whether it got there, and was not given up."""
        seen = EventReader() if self._hang_up is not None else None
        chunks = size = 0
        while True:
            received = await reader.read(_READ_BYTES)
            now = time.monotonic()
            if not received and not self._status:
                raise ConnectionError("the connection was closed without an answer")
            connection.receive_data(received)
            piece, whole = self._taken(connection)
            if piece:
                self._pieces.append((now, piece))
                size += len(piece)
            if size > _MOST_BYTES:
                raise OSError(f"an answer of more than {_MOST_BYTES} bytes")
            if seen is not None and self._hang_up is not None:
                chunks += len(seen.feed(piece))
                if chunks >= self._hang_up:
                    return False
            if whole:
                return True

    def _taken(self, connection: h11.Connection) -> tuple[bytes, bool]:
        """The body's bytes that have come, and whether the answer has ended."""
        body = b""
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                self._status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return body, True
            elif event is h11.NEED_DATA or event is h11.PAUSED:
                return body, False

    def _judged(self, whole: bool) -> Observed:
        if self._status == _FULL:
            return self.ended("refused", "status 429")
        if self._status != 200:
            said = b"".join(piece for _, piece in self._pieces)[-_ERROR_CHARS:]
            return self.ended("failed", f"status {self._status}: {said!r}")
        if not whole:
            return self.ended("aborted")
        found = self.ended("completed")
        wrong = _what_is_wrong(found.answer)
        return found if wrong is None else self.ended("failed", wrong)


@cache
def _trusting() -> ssl.SSLContext:
    """The system's certificates; reading them takes long enough to make other requests late."""
    return ssl.create_default_context()


def _what_is_wrong(answer: Answer) -> str | None:
    if answer.error is not None:
        return answer.error
    if not answer.done:
        return "the stream ended without [DONE]"
    # Tokens may well have no text: special ones, and pieces of a character.
    if not answer.arrivals and not answer.output_tokens:
        return "the stream brought no text"
    return None
