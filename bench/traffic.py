"""When requests are sent: at random times whatever comes back, or each when one has been answered.

Open loop is a Poisson stream of strangers; its requests do not wait for a slow server, so that a
queue shows. Closed loop is a number of clients, each with one request after another.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .client import Observed

_LOOK_S = 0.005  # how often the client's own lag is looked at

# Sends the request of a number, from 0.
Send = Callable[[int], Awaitable[Observed]]


@dataclass(frozen=True)
class Load:
    """One way to load an endpoint: `rate` in requests a second, or `concurrency` clients."""

    rate: float | None = None
    concurrency: int | None = None

    @property
    def mode(self) -> str:
        """open or closed."""
        return "open" if self.rate is not None else "closed"

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.rate:g} req/s" if self.rate is not None else f"{self.concurrency} clients"


@dataclass(frozen=True)
class Sent:
    """A request and when it was due, in seconds of the monotonic clock."""

    due: float
    observed: Observed


@dataclass(frozen=True)
class Round:
    """One repetition of a load: all requests, in the order of their numbers.

    `began` is when the first was due; `lags_s` is by how much the client's own event loop was late,
    looked at all the time: what it adds to every figure.
    """

    began: float
    requests: tuple[Sent, ...]
    lags_s: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        """From the first request's time to the last answer."""
        return max(each.observed.ended for each in self.requests) - self.began


async def run_round(load: Load, count: int, seed: int, send: Send) -> Round:
    """Send `count` requests and wait for all answers. Equal seeds give equal times."""
    lags: list[float] = []
    watch = asyncio.create_task(_watch(lags))
    began = time.monotonic()
    try:
        if load.rate is not None:
            sent = await _open(load.rate, count, random.Random(seed), send)
        else:
            sent = await _closed(load.concurrency or 1, count, send)
    finally:
        watch.cancel()
    return Round(began, tuple(sent), tuple(lags))


async def _watch(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        lags.append(max(0.0, time.monotonic() - due))


async def _open(rate: float, count: int, dice: random.Random, send: Send) -> list[Sent]:
    async def one(number: int, due: float) -> Sent:
        return Sent(due, await send(number))

    due, tasks = time.monotonic(), []
    for number in range(count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(number, due)))
        due += dice.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _closed(clients: int, count: int, send: Send) -> list[Sent]:
    numbers = iter(range(count))
    sent: dict[int, Sent] = {}

    async def client() -> None:
        for number in numbers:
            due = time.monotonic()
            sent[number] = Sent(due, await send(number))

    await asyncio.gather(*(client() for _ in range(min(clients, count))))
    return [sent[number] for number in range(count)]
