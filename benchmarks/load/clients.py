"""Clients of a server's completions: each streams, counts, and may hang up in the middle."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from halfweave.bench.client import Observed, Target, ask


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


async def complete(url: str, model: str, asked: Ask, tally: Tally) -> None:
    """Send one request and read its stream; everything that happens goes into the tally."""
    tally.requests += 1
    found = await ask(Target(url, model), asked.prompt, asked.max_tokens, asked.hang_up)
    if found.outcome == "refused":
        tally.full += 1
        tally.full_s.append(found.ended - found.sent)
    elif found.outcome in ("failed", "timed_out"):
        tally.errors.append(str(found.error))
    else:
        _count(found, asked, tally)


def _count(found: Observed, asked: Ask, tally: Tally) -> None:
    times = [arrival.at for arrival in found.answer.arrivals]
    tally.ttft_s += [at - found.sent for at in times[:1]]
    tally.gaps_s += [b - a for a, b in pairwise(times)]
    if found.outcome == "aborted":
        tally.aborted += 1
    elif found.answer.output_tokens != asked.max_tokens:
        tally.errors.append(
            f"the answer has not {asked.max_tokens} tokens: {found.answer.output_tokens}"
        )
    else:
        tally.finished += 1
        tally.tokens += asked.max_tokens


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
