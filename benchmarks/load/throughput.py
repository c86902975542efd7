"""How many tokens a second a server writes for so many clients at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

from halfweave.bench.server_process import ServerProcess

from .clients import Ask, Tally, complete
from .soak import percentile

_PROMPT = "Once upon a time there was a loom that kept two threads of every four, and"


@dataclass(frozen=True)
class Throughput:
    """Median over the rounds, with the least and the greatest; tokens of all clients together."""

    batch: int
    tokens_per_s: float
    low: float
    high: float
    itl_ms_p50: float


def throughputs(
    running: ServerProcess, batches: tuple[int, ...], tokens: int, rounds: int
) -> list[Throughput]:
    """The batches in turns, so that whatever else the machine does falls on all alike."""
    found: dict[int, list[float]] = {batch: [] for batch in batches}
    gaps: dict[int, list[float]] = {batch: [] for batch in batches}
    for number in range(rounds + 1):
        for batch in batches:
            tally, took = asyncio.run(_at_once(running, batch, tokens))
            if tally.errors:
                raise RuntimeError(tally.errors[0])
            if number:  # the first round warms up
                found[batch].append(tally.tokens / took)
                gaps[batch] += tally.gaps_s
    return [
        Throughput(
            batch,
            statistics.median(speeds),
            min(speeds),
            max(speeds),
            percentile(gaps[batch], 0.5),
        )
        for batch, speeds in found.items()
    ]


async def _at_once(running: ServerProcess, batch: int, tokens: int) -> tuple[Tally, float]:
    tally, started = Tally(), time.monotonic()
    asks = [Ask(f"{_PROMPT} {number}", tokens) for number in range(batch)]
    await asyncio.gather(*(complete(running.url, running.model, ask, tally) for ask in asks))
    return tally, time.monotonic() - started


async def full_queue_ms(running: ServerProcess, capacity: int, tries: int) -> list[float]:
    """Milliseconds until a full server says so, while it works; `capacity` requests fill it."""
    tally, probe = Tally(), Tally()
    filling = [
        asyncio.create_task(complete(running.url, running.model, Ask(f"{_PROMPT} {n}", 400), tally))
        for n in range(capacity)
    ]
    while (
        running.figure("num_requests_running") + running.figure("num_requests_waiting") < capacity
    ):
        await asyncio.sleep(0.05)
    for _ in range(tries):
        await complete(running.url, running.model, Ask(_PROMPT, 1), probe)
    for task in filling:
        task.cancel()
    await asyncio.gather(*filling, return_exceptions=True)
    if probe.full < tries:
        raise RuntimeError(f"{tries - probe.full} of {tries} requests found room in a full server")
    return [1000 * each for each in probe.full_s]
