"""Clients of a server's completions: each streams, counts, and may hang up in the middle.

Plain asyncio sockets, because 64 clients of a full HTTP library take more of two cores than the
server does, which would then measure the library.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_FEW_BYTES = 2**16


@dataclass
class Tally:
    """What the clients of a run saw."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    full: int = 0  # answered 429
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    full_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ask:
    """One completion to ask for; hangs up after `hang_up` tokens, if that is not None."""

    prompt: str
    max_tokens: int
    hang_up: int | None = None


async def complete(url: str, model: str, ask: Ask, tally: Tally) -> None:
    """Send one request and read its stream; everything that happens goes into the tally."""
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    tally.requests += 1
    try:
        await _exchange(url, body, ask, tally)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        tally.errors.append(f"{type(error).__name__}: {error}")


async def _exchange(url: str, body: dict[str, Any], ask: Ask, tally: Tally) -> None:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=_FEW_BYTES)
    try:
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
            "Connection: close\r\n\r\n"
        )
        started = time.monotonic()
        writer.write(head.encode() + payload)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        if status == 429:
            tally.full += 1
            tally.full_s.append(time.monotonic() - started)
        elif status != 200:
            tally.errors.append(f"status {status}: {(await reader.read(500))[-300:]!r}")
        else:
            await _read_stream(reader, started, ask, tally)
    finally:
        writer.close()


async def _read_stream(
    reader: asyncio.StreamReader, started: float, ask: Ask, tally: Tally
) -> None:
    seen, newest, usage = 0, started, None
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue  # heads, blank lines, pings, and the sizes of chunks
        if line.startswith(b"data: [DONE]"):
            break
        now, document = time.monotonic(), json.loads(line[6:])
        if "error" in document:
            tally.errors.append(f"in a stream: {document['error']['message']}")
            return
        if document["choices"] == []:
            usage = document["usage"]
            continue
        (tally.gaps_s if seen else tally.ttft_s).append(now - newest)
        newest, seen = now, seen + 1
        if ask.hang_up is not None and seen >= ask.hang_up:
            tally.aborted += 1
            return
    if usage is None or usage["completion_tokens"] != ask.max_tokens:
        tally.errors.append(f"the answer has not {ask.max_tokens} tokens: {usage}")
        return
    tally.finished += 1
    tally.tokens += usage["completion_tokens"]


async def keep_asking(
    url: str, model: str, clients: int, until: float, make: Callable[[random.Random], Ask]
) -> Tally:
    """So many clients, each with one request after another until the clock says so."""
    tally = Tally()

    async def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            before = tally.full
            await complete(url, model, make(dice), tally)
            if tally.full > before:
                await asyncio.sleep(dice.uniform(0.2, 1.0))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally
