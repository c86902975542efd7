"""The bridge between the event loop and the engine's thread.

Knows events and their order, not what clients are told about them.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fastapi.concurrency import run_in_threadpool

from ..errors import EngineDeadError
from ..runtime.params import SamplingParams
from ..runtime.request import (
    Constraint,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptScored,
    TextDelta,
    TokenLogprob,
)
from .errors import ApiError, unavailable
from .record import Record
from .service import Served, Service


@dataclass(frozen=True)
class Ask:
    """One answer that is asked of the engine; see GenerationRequest."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    salt: bytes = b""
    constraint: Constraint | None = None
    goes_on: bool = False

    def request(self, request_id: str) -> GenerationRequest:
        """For the engine, under an id."""
        return GenerationRequest(
            request_id,
            tuple(self.prompt_ids),
            self.params,
            self.priority,
            self.salt,
            self.constraint,
            self.goes_on,
        )


def numbered(params: SamplingParams, number: int) -> SamplingParams:
    """Parameters of one of several answers to a prompt: each draws from a seed of its own."""
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=(params.seed + number + 2**63) % 2**64 - 2**63)


@dataclass
class Output:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    end: Finished | None = None

    def add(self, event: Event) -> None:
        """What an event brings."""
        match event:
            case TextDelta(text, token_ids, logprobs):
                self.text += text
                self.token_ids += token_ids
                self.logprobs += logprobs
            case PromptScored(logprobs):
                self.prompt_logprobs = logprobs
            case Finished():
                self.end = event


class EngineCall:
    """The answers of one HTTP request in the engine: admitted together, ended together.

    Make it with `admit`. Whoever made it calls `close`, whatever happens.
    """

    def __init__(self, service: Service, served: Served, prefix: str, record: Record) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.asks: Sequence[Ask] = ()
        self._service, self._served, self._record = service, served, record
        self._mailbox = service.mailbox
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: set[int] = set()
        self._closed = False
        self._began = time.monotonic()
        self._newest: dict[int, float] = {}

    @classmethod
    async def admit(
        cls,
        service: Service,
        served: Served,
        record: Record,
        prefix: str,
        prepare: Callable[[], Sequence[Ask]],
        compiles: bool = False,
    ) -> EngineCall:
        """Submit all answers that `prepare` gives, off the event loop; all are admitted, or none.

        `prefix` begins the call's id. What is noted goes into the record. `compiles` says that
        `prepare` may take seconds, to see what an answer must look like; few do that at a time,
        and never in the way of those that do not.

        Raises:
            RequestError, CapacityError, EngineDeadError: see Engine.submit; or from `prepare`.
            CapacityError: too many wait to be compiled.
        """
        call = cls(service, served, prefix, record)
        record.model = served.name
        try:
            if compiles:
                await service.compiling.run(call._submit, prepare)
            else:
                await run_in_threadpool(call._submit, prepare)
        except BaseException:
            call.close()
            raise
        return call

    @property
    def size(self) -> int:
        """How many answers were asked for."""
        return len(self.asks)

    async def events(self, ping_s: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """Each event with its answer's number, until all have ended.

        After `ping_s` seconds of silence there is a None.

        Raises:
            Exception: the engine failed an answer; the others are for `close` to end.
            ApiError: the engine was stopped meanwhile, or the client reads too slowly.
        """
        ended = 0
        while ended < self.size:
            if self._events.empty():
                try:
                    index, event = await asyncio.wait_for(self._events.get(), ping_s)
                except TimeoutError:
                    yield None
                    continue
            else:
                index, event = self._events.get_nowait()
            if isinstance(event, Failed):
                raise _failure(event.error)
            if isinstance(event, Finished):
                ended += 1
                if event.reason == "abort":
                    raise unavailable("the server stopped before the answer was whole", "aborted")
            yield index, event

    async def outputs(self) -> list[Output]:
        """Wait for all answers, in the order they were asked for. Raises as `events` does."""
        outputs = [Output() for _ in range(self.size)]
        async for item in self.events():
            if item is not None:
                index, event = item
                outputs[index].add(event)
        return outputs

    def close(self) -> None:
        """Abort whatever has not ended, or is submitted yet. Idempotent."""
        self._closed = True
        for index in sorted(self._open):
            self._record.finish["abort"] += 1
            self._served.engine.abort(self._request_id(index))
        self._open.clear()

    def _submit(self, prepare: Callable[[], Sequence[Ask]]) -> None:
        asks = prepare()
        if self._closed:  # whoever asked did not wait for it
            return
        requests = [
            (ask.request(self._request_id(index)), partial(self._emit, index))
            for index, ask in enumerate(asks)
        ]
        self._open.update(range(len(asks)))  # first, so that no end can come before
        try:
            self._served.engine.submit_all(requests)
        except BaseException:
            self._open.clear()
            raise
        self.asks = asks
        if self._closed:  # meanwhile, when the engine did not know of them yet
            for index in range(len(asks)):
                self._served.engine.abort(self._request_id(index))

    def _request_id(self, index: int) -> str:
        return f"{self.id}-{index}"

    def _emit(self, index: int, event: Event) -> None:
        """Runs on the engine's thread."""
        self._mailbox.put(self._receive, index, event, time.monotonic())

    def _receive(self, index: int, event: Event, now: float) -> None:
        """Runs on the event loop, whether or not anybody still reads."""
        if index not in self._open:
            return
        self._observe(index, event, now)
        if isinstance(event, Finished | Failed):
            self._open.discard(index)
        if self._events.qsize() >= self._service.settings.max_unread:
            self.close()
            event = Failed(ApiError(408, "the client reads too slowly", code="timeout"))
        self._events.put_nowait((index, event))

    def _observe(self, index: int, event: Event, now: float) -> None:
        match event:
            case TextDelta(token_ids=token_ids) if token_ids:
                if index in self._newest:
                    self._meter("inter_token_latency_seconds", now - self._newest[index])
                else:
                    self._meter("time_to_first_token_seconds", now - self._began)
                self._newest[index] = now
            case Finished(usage=usage, timings=timings):
                self._record.add(event)
                self._meter("e2e_request_latency_seconds", now - self._began)
                self._meter("request_queue_time_seconds", timings.queue_ms / 1000)
                self._meter("request_prefill_time_seconds", timings.prefill_ms / 1000)
                self._meter("request_decode_time_seconds", timings.decode_ms / 1000)
                self._meter("request_prompt_tokens", usage.prompt_tokens)
                self._meter("request_generation_tokens", usage.completion_tokens)
            case Failed():
                self._record.finish["error"] += 1

    def _meter(self, figure: str, value: float) -> None:
        self._service.meters.observe(self._served.name, figure, value)


def _failure(error: Exception) -> Exception:
    """An answer that had begun is lost, which the same request later need not be."""
    if isinstance(error, EngineDeadError):
        headers = {"x-should-retry": "false"}
        return ApiError(500, "the engine has stopped", code="engine_dead", headers=headers)
    return error
