"""A server under load for a while: nothing fails, and nothing grows."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from halfweave.bench.server_process import Footprint, ServerProcess, server

from .clients import Ask, Tally, keep_asking

_TEXT = (
    "the river keeps two weights of every four and serves what is left of them to anybody who "
    "asks for a story about a small machine that had to carry more than it could hold"
)
_WORDS = tuple(_TEXT.split())
_ABORTED = 0.05  # of all requests are given up by their client
_WARM_UP = 0.15  # of the time: buffers and pages are touched for the first time


@dataclass(frozen=True)
class SoakResult:
    """What a soak saw; memory and the rest are compared between warm-up and end."""

    seconds: float
    clients: int
    requests: int
    finished: int
    aborted: int
    refused_429: int
    errors_other_than_429: int
    rss_start_mib: float
    rss_end_mib: float
    fds_start: int
    fds_end: int
    threads_start: int
    threads_end: int
    blocks_leaked: int
    tokens_per_s: float
    ttft_ms_p50_early: float
    ttft_ms_p50_late: float
    itl_ms_p50: float
    itl_ms_p99_early: float
    itl_ms_p99_late: float


def mixed(dice: random.Random) -> Ask:
    """Short and long prompts, short and long answers, and now and then a client that leaves."""
    words = dice.choice((5, 20, 60, 200, 600))
    prompt = " ".join(dice.choice(_WORDS) for _ in range(words))
    tokens = dice.choice((4, 16, 48, 96))
    hang_up = dice.randint(1, tokens) if dice.random() < _ABORTED else None
    return Ask(prompt, tokens, hang_up)


def soak(
    model: Path, seconds: float, clients: int, flags: list[str]
) -> tuple[SoakResult, list[str]]:
    """Serve `model` and load it for so long; the second value has every error in its own words."""
    with server(model, flags) as running:
        begun = time.monotonic()
        warm_end, end = begun + _WARM_UP * seconds, begun + seconds
        early = asyncio.run(keep_asking(running.url, running.model, clients, warm_end, mixed))
        wait_until_idle(running)
        before = running.footprint()
        late = asyncio.run(keep_asking(running.url, running.model, clients, end, mixed))
        wait_until_idle(running)
        after = running.footprint()
        took = time.monotonic() - begun
        leaked = int(running.figure("kv_pages_used"))
        found = _result(took, clients, early, late, before, after, leaked)
        return found, early.errors + late.errors


def wait_until_idle(running: ServerProcess, seconds: float = 60.0) -> None:
    """Until nothing runs or waits; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while running.figure("num_requests_running") + running.figure("num_requests_waiting"):
        if time.monotonic() > deadline:
            raise TimeoutError("the server does not come to rest")
        time.sleep(0.1)
    time.sleep(0.5)  # until closed connections are gone too


def percentile(values: list[float], share: float) -> float:
    """In milliseconds; 0 of nothing."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _result(
    took: float,
    clients: int,
    early: Tally,
    late: Tally,
    before: Footprint,
    after: Footprint,
    leaked: int,
) -> SoakResult:
    half = len(late.gaps_s) // 2
    half_first = len(late.ttft_s) // 2
    return SoakResult(
        seconds=took,
        clients=clients,
        requests=early.requests + late.requests,
        finished=early.finished + late.finished,
        aborted=early.aborted + late.aborted,
        refused_429=early.full + late.full,
        errors_other_than_429=len(early.errors) + len(late.errors),
        rss_start_mib=before.rss_mib,
        rss_end_mib=after.rss_mib,
        fds_start=before.fds,
        fds_end=after.fds,
        threads_start=before.threads,
        threads_end=after.threads,
        blocks_leaked=leaked,
        tokens_per_s=(early.tokens + late.tokens) / took,
        ttft_ms_p50_early=percentile(late.ttft_s[:half_first], 0.5),
        ttft_ms_p50_late=percentile(late.ttft_s[half_first:], 0.5),
        itl_ms_p50=percentile(late.gaps_s, 0.5),
        itl_ms_p99_early=percentile(late.gaps_s[:half], 0.99),
        itl_ms_p99_late=percentile(late.gaps_s[half:], 0.99),
    )


def to_json(result: SoakResult) -> dict[str, object]:
    """The result as a document."""
    return asdict(result)
