"""An endpoint under load: what its users wait for, by definitions that docs/benchmarks.md has.

TTFT is the first text received minus the request sent. ITL is the gap between successive tokens,
the first excluded; it is left out where tokens came together, since nobody can say then when each
was sent. TPOT is (E2E - TTFT) / (tokens - 1), E2E ends with the last text. Tokens are counted by
the server's usage, never by chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ..errors import HalfweaveError
from .client import Target, ask
from .progress import Progress, silent
from .prompts import Prompts
from .serve_plan import ServePlan
from .stats import distribution, percentiles
from .traffic import Load, Round, Sent, run_round

# A point has an ITL if at least so many of its answers came token by token.
_SEPARATE = 0.9
_LAG_WARNING_MS = 5.0

_Percentiles = Mapping[str, float | None]


@dataclass(frozen=True)
class RequestSample:
    """One request. Times in ms, `due_s` and `sent_s` since its round began.

    `chunk_gaps_ms` are between arrivals of text, `together` those that brought more than one chunk;
    `output_tokens` are None where the server told none.
    """

    repetition: int
    outcome: str
    error: str | None
    due_s: float
    sent_s: float
    ttft_ms: float | None
    e2e_ms: float | None
    tpot_ms: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    chunk_gaps_ms: tuple[float, ...]
    together: int

    @property
    def separate(self) -> bool:
        """Whether each token came by itself, so that gaps between chunks are those of tokens."""
        return self.together == 0 and self.output_tokens == len(self.chunk_gaps_ms) + 1


@dataclass(frozen=True)
class ServePoint:
    """One load on one endpoint, over all repetitions; percentiles are pooled over its requests.

    `completed`, `failed`, `refused` (429) and `timed_out` make up `requests`. `itl_ms` is None
    where tokens came together; `goodput_per_s` where no limits were given. `send_lag_ms` is how
    late requests were sent, `client_lag_ms` how late the client looked.
    """

    model: str
    mode: str
    rate: float | None
    concurrency: int | None
    requests: int
    completed: int
    failed: int
    refused: int
    timed_out: int
    duration_s: float
    durations_s: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    ttft_ms: _Percentiles | None
    itl_ms: _Percentiles | None
    chunk_gap_ms: _Percentiles | None
    tpot_ms: _Percentiles | None
    e2e_ms: _Percentiles | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    requests_per_s: float
    goodput_per_s: float | None
    coalesced_requests: int
    send_lag_ms: _Percentiles
    client_lag_ms: _Percentiles
    samples: tuple[RequestSample, ...]


def bench_serve(
    targets: Mapping[str, Target],
    prompts: Prompts,
    plan: ServePlan,
    progress: Progress | None = None,
) -> tuple[ServePoint, ...]:
    """Load the endpoints, by the name to print, and measure; loads and endpoints take turns.

    Raises:
        HalfweaveError: an endpoint does not answer the requests that warm up, or none of a round.
    """
    return asyncio.run(_measured(targets, prompts, plan, progress or silent))


async def _measured(
    targets: Mapping[str, Target], prompts: Prompts, plan: ServePlan, tell: Progress
) -> tuple[ServePoint, ...]:
    for name, target in targets.items():
        await _warm_up(name, target, prompts, plan)
    places = [(name, load) for load in plan.loads for name in targets]
    rounds: dict[tuple[str, Load], list[Round]] = {place: [] for place in places}
    for repetition in range(plan.repetitions):
        for number, (name, load) in enumerate(places):
            salt = f"{plan.loads.index(load)} {repetition}"
            texts, target = prompts.make(plan.requests, salt), targets[name]
            found = await run_round(
                load,
                plan.requests,
                plan.seed * 1000 + repetition,
                lambda at, target=target, texts=texts: ask(target, texts[at], plan.new_tokens),  # type: ignore[misc]
            )
            _still_there(name, found)
            rounds[name, load].append(found)
            done = repetition * len(places) + number + 1
            tell(done, plan.repetitions * len(places), f"{name}, {load.line}")
    return tuple(_point(name, load, found, plan) for (name, load), found in rounds.items())


def _still_there(name: str, found: Round) -> None:
    """Raise HalfweaveError where all of a round failed: then there is nobody to be measured."""
    observed = [sent.observed for sent in found.requests]
    if all(each.outcome == "failed" for each in observed):
        raise HalfweaveError(f"{name} does not answer any more: {observed[-1].error}")


async def _warm_up(name: str, target: Target, prompts: Prompts, plan: ServePlan) -> None:
    for text in prompts.make(plan.warmups, "warm up"):
        observed = await ask(target, text, plan.new_tokens)
        if observed.outcome != "completed":
            hint = None
            if plan.ignore_eos and (observed.error or "").startswith("status 4"):
                hint = "--no-ignore-eos, if the endpoint does not know that field"
            raise HalfweaveError(f"{name} does not answer: {observed.error}", hint)


def _point(name: str, load: Load, rounds: Sequence[Round], plan: ServePlan) -> ServePoint:
    samples = [
        _request_sample(sent, each.began, repetition)
        for repetition, each in enumerate(rounds)
        for sent in each.requests
    ]
    outcomes = [sample.outcome for sample in samples]
    good = [sample for sample in samples if sample.outcome == "completed"]
    seconds = [each.duration_s for each in rounds]
    total, separate = sum(seconds), [sample for sample in good if sample.separate]
    written, read = _all(s.output_tokens for s in good), _all(s.prompt_tokens for s in good)
    itl = [gap for sample in separate for gap in sample.chunk_gaps_ms]
    late = [1000 * (sample.sent_s - sample.due_s) for sample in samples]
    lags = [1000 * lag for each in rounds for lag in each.lags_s] or [0.0]
    return ServePoint(
        name,
        load.mode,
        load.rate,
        load.concurrency,
        len(samples),
        len(good),
        outcomes.count("failed"),
        outcomes.count("refused"),
        outcomes.count("timed_out"),
        total,
        tuple(seconds),
        prompt_tokens=read,
        output_tokens=written,
        ttft_ms=distribution(_known(s.ttft_ms for s in good)),
        itl_ms=distribution(itl) if len(separate) >= _SEPARATE * len(good) else None,
        chunk_gap_ms=distribution([gap for s in good for gap in s.chunk_gaps_ms]),
        tpot_ms=distribution(_known(s.tpot_ms for s in good)),
        e2e_ms=distribution(_known(s.e2e_ms for s in good)),
        output_tokens_per_s=None if written is None else written / total,
        total_tokens_per_s=None if written is None or read is None else (written + read) / total,
        requests_per_s=len(good) / total,
        goodput_per_s=_goodput(good, plan.slos, total),
        coalesced_requests=len(good) - len(separate),
        send_lag_ms={**percentiles(late), "max": max(late)},
        client_lag_ms={**percentiles(lags), "max": max(lags)},
        samples=tuple(samples),
    )


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _all(counts: Any) -> int | None:
    """The sum, if every one is known."""
    known = list(counts)
    return None if any(count is None for count in known) else sum(known)


def _request_sample(sent: Sent, began: float, repetition: int) -> RequestSample:
    observed = sent.observed
    arrivals, tokens = observed.answer.arrivals, observed.answer.output_tokens
    ttft = e2e = tpot = None
    if arrivals and observed.outcome == "completed":
        ttft = 1000 * (arrivals[0].at - observed.sent)
        e2e = 1000 * (arrivals[-1].at - observed.sent)
        # What came in one piece says nothing of the time between its tokens.
        if tokens is not None and tokens > 1 and len(arrivals) > 1:
            tpot = (e2e - ttft) / (tokens - 1)
    return RequestSample(
        repetition,
        observed.outcome,
        observed.error,
        sent.due - began,
        observed.sent - began,
        ttft,
        e2e,
        tpot,
        observed.answer.prompt_tokens,
        tokens,
        tuple(1000 * (b.at - a.at) for a, b in pairwise(arrivals)),
        sum(arrival.chunks > 1 for arrival in arrivals),
    )


def _goodput(
    completed: Sequence[RequestSample], slos: Mapping[str, float], seconds: float
) -> float | None:
    if not slos:
        return None
    return sum(_is_good(sample, slos) for sample in completed) / seconds


def _is_good(sample: RequestSample, slos: Mapping[str, float]) -> bool:
    """Within every limit; an answer in one piece has no TPOT to miss, one of unknown length has."""
    for name, limit in slos.items():
        value = getattr(sample, f"{name}_ms")
        if name == "tpot" and sample.output_tokens is not None and not sample.chunk_gaps_ms:
            continue
        if value is None or value > limit:
            return False
    return True


def serve_notes(points: Sequence[ServePoint]) -> list[str]:
    """What has to be known to read the numbers."""
    notes = []
    for point in points:
        load = f"{point.rate:g} req/s" if point.rate is not None else f"{point.concurrency} clients"
        where = f"{point.model}, {load}"
        lost = point.requests - point.completed
        if lost:
            errors = [s.error for s in point.samples if s.error and s.outcome == "failed"]
            said = f", such as: {errors[0]}" if errors else ""
            notes.append(
                f"{where}: {lost} of {point.requests} requests were not answered "
                f"({point.refused} refused, {point.timed_out} timed out, {point.failed} failed)"
                f"{said}; they are in no time below"
            )
        if point.completed and point.output_tokens is None:
            notes.append(f"{where}: the endpoint tells no usage, so its tokens are not counted")
        elif point.completed and point.itl_ms is None:
            notes.append(
                f"{where}: tokens came together in {point.coalesced_requests} of {point.completed} "
                "answers, so there are gaps between chunks and no ITL"
            )
        late = point.client_lag_ms["p99"]
        if late is not None and late > _LAG_WARNING_MS:
            notes.append(f"{where}: the client itself was late by {late:.1f} ms (p99)")
    return notes


def points_body(points: Sequence[ServePoint]) -> dict[str, Any]:
    """What a document has of this kind alone, raw samples included."""
    return {"points": [asdict(point) for point in points]}
