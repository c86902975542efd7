"""An endpoint whose delays are known, to prove that a client's figures are right.

    python -m halfweave.bench.mock_server --ttft-ms 200 --gap-ms 50

It streams completions and chats like any server of OpenAI's API, but its tokens mean nothing: the
first comes `ttft` after the request, each further one `gap` after the one before, and `chunk`
tokens come in one event. `GET /sent` has the times at which it really wrote, so that a busy machine
is told from a wrong client. Its first line on stdout is its address.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11

_NAME = "mock"


@dataclass(frozen=True)
class Script:
    """What the server does. Every `refuse_every`-th request gets 429, every `fail_every`-th 500.

    After `fail_after` requests all get 500.
    `merge` events are written at once, as a network may deliver them. A `stalled` server sends no
    token. Zero means never.
    """

    ttft_ms: float = 200.0
    gap_ms: float = 50.0
    chunk: int = 1
    merge: int = 1
    usage: bool = True
    refuse_every: int = 0
    fail_every: int = 0
    fail_after: int = 0
    stalled: bool = False


@dataclass
class MockServer:
    """The server; `sent` has for every answer the seconds from its request to each write."""

    script: Script
    requests: int = 0
    sent: list[list[float]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which has one request."""
        try:
            connection = h11.Connection(h11.SERVER)
            request, body = await _request(connection, reader)
            await self._answer(connection, writer, request, body, time.monotonic())
        except (OSError, h11.RemoteProtocolError):
            pass  # the client has gone, or is none
        finally:
            writer.close()

    async def _answer(
        self,
        connection: h11.Connection,
        writer: asyncio.StreamWriter,
        request: h11.Request,
        body: bytes,
        received: float,
    ) -> None:
        if request.method == b"GET":
            known = {"/sent": self.sent, "/v1/models": {"data": [{"id": _NAME}]}}
            writer.write(_whole(connection, 200, known.get(request.target.decode(), {})))
            return
        self.requests += 1
        script = self.script
        for every, status in ((script.refuse_every, 429), (script.fail_every, 500)):
            if every and self.requests % every == 0:
                writer.write(_whole(connection, status, {"error": {"message": "as told"}}))
                return
        if script.fail_after and self.requests > script.fail_after:
            writer.write(_whole(connection, 500, {"error": {"message": "as told"}}))
            return
        await self._stream(connection, writer, json.loads(body), received)

    async def _stream(
        self,
        connection: h11.Connection,
        writer: asyncio.StreamWriter,
        asked: dict[str, Any],
        received: float,
    ) -> None:
        script, tokens, chat = self.script, int(asked["max_tokens"]), "messages" in asked
        head = h11.Response(status_code=200, headers=[("Content-Type", "text/event-stream")])
        writer.write(connection.send(head) or b"")
        if script.stalled:
            await asyncio.sleep(3600)
        writes: list[float] = []
        self.sent.append(writes)
        waiting: list[bytes] = []
        for first in range(0, tokens, script.chunk):
            count = min(script.chunk, tokens - first)
            due = script.ttft_ms + script.gap_ms * (first + count - 1)
            waiting.append(_event(_delta("a " * count, chat)))
            if len(waiting) == script.merge or first + count == tokens:
                await asyncio.sleep(received + due / 1000 - time.monotonic())
                writes.append(time.monotonic() - received)
                writer.write(connection.send(h11.Data(data=b"".join(waiting))) or b"")
                waiting.clear()
        ends = [b"data: [DONE]\n\n"]
        if script.usage:
            usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
            ends.insert(0, _event({"choices": [], "usage": usage}))
        writer.write(connection.send(h11.Data(data=b"".join(ends))) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()


async def _request(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request, bytes]:
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, body
        else:
            raise OSError("no request")


def _delta(text: str, chat: bool) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}} if chat else {"text": text}]}


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


def _whole(connection: h11.Connection, status: int, document: Any) -> bytes:
    data = json.dumps(document).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    parts = (
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=data),
        h11.EndOfMessage(),
    )
    return b"".join(connection.send(part) or b"" for part in parts)


def _script() -> Script:
    parser = argparse.ArgumentParser(description="An endpoint whose delays are known.")
    for name, default in vars(Script()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, dest=name
            )
        else:
            parser.add_argument(flag, type=type(default), default=default, dest=name)
    return Script(**vars(parser.parse_args()))


async def _main(script: Script) -> None:
    server = await asyncio.start_server(MockServer(script).serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(_script()))
