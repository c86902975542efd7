"""The engine: one thread owns the model; callers submit requests and are told of events.

Requests are carried out in order, one at a time for now; nothing in the interface depends on that.
Whatever happens, each admitted request gets exactly one last event, Finished or Failed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..errors import CapacityError, EngineDeadError, RequestError
from .generation import Generation
from .model import Model
from .request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Timings,
    Usage,
)

_log = logging.getLogger(__name__)

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class EngineStats:
    """A moment's view of the engine; the counters never go down."""

    waiting: int
    running: int
    alive: bool
    requests_finished: int
    prompt_tokens: int
    completion_tokens: int


@dataclass
class _Job:
    request: GenerationRequest
    emit: Emit
    submitted_at: float = field(default_factory=time.monotonic)
    aborted: bool = False


class EventStream:
    """The events of one request, as they come. Ends after the last; `close` or `del` aborts."""

    def __init__(self, events: queue.SimpleQueue[Event], abort: Callable[[], None]) -> None:
        self._events = events
        self._abort = abort
        self._ended = False

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        self._ended = isinstance(event, Finished | Failed)
        return event

    def close(self) -> None:
        """Abort the request, unless it has ended; no further event is returned."""
        if not self._ended:
            self._ended = True
            self._abort()

    def __del__(self) -> None:
        self.close()


class Engine:
    """Runs requests on a model. Close it, or use it as a context manager."""

    def __init__(self, model: Model, max_waiting: int = 64) -> None:
        """Start the engine's thread. `max_waiting` bounds the queue behind the running request."""
        self.model = model
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closing = False
        self._dead = False
        self._finished = self._prompt_tokens = self._completion_tokens = 0
        self._thread = threading.Thread(target=self._main, name="halfweave-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """Admit a request; returning means that it will be carried out.

        `emit` is called on the engine's thread for every event, must not block, and gets exactly
        one Finished or Failed, as the last. If it raises, the request is aborted.

        Raises:
            RequestError: the prompt cannot fit the model, or the id is in flight already.
            CapacityError: the queue is full.
            EngineDeadError: the engine is closed, or its thread has died.
        """
        self._check_fits(request)
        with self._wake:
            if self._closing or self._dead:
                raise EngineDeadError("the engine is not running")
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            if any(job.request.id == request.id for job in jobs):
                raise RequestError(f"request id {request.id!r} is in flight already", "request_id")
            if len(self._waiting) >= self._max_waiting:
                raise CapacityError(f"{len(self._waiting)} requests are waiting, which is the most")
            self._waiting.append(_Job(request, emit))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request with Finished("abort") within one step. Unknown ids are ignored."""
        with self._wake:
            for job in (*self._waiting, self._running):
                if job is not None and job.request.id == request_id:
                    job.aborted = True
            self._wake.notify()

    def stream(self, request: GenerationRequest) -> EventStream:
        """Submit now, then iterate over the events; closing the stream aborts.

        Raises as `submit` does, before the first event is asked for.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        return EventStream(events, partial(self.abort, request.id))

    def stats(self) -> EngineStats:
        """Counters and queue lengths at this moment."""
        with self._wake:
            return EngineStats(
                len(self._waiting),
                int(self._running is not None),
                not self._dead,
                self._finished,
                self._prompt_tokens,
                self._completion_tokens,
            )

    def close(self, drain_s: float = 0.0) -> None:
        """Admit nothing more, let requests finish for up to `drain_s` seconds, abort the rest."""
        deadline = time.monotonic() + drain_s
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._wake:
            for job in (*self._waiting, self._running):
                if job is not None:
                    job.aborted = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_fits(self, request: GenerationRequest) -> None:
        longest, vocab = self.model.max_model_len, self.model.spec.vocab
        if len(request.prompt_ids) >= longest:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; the context has {longest}, "
                "one of them for the answer",
                param="prompt",
                code="context_length_exceeded",
            )
        if max(request.prompt_ids) >= vocab:
            raise RequestError(
                f"token id {max(request.prompt_ids)} is outside the vocabulary of {vocab}",
                param="prompt",
            )

    # ---- below: the engine's own thread

    def _main(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._carry_out(job)
        except BaseException:
            _log.exception("the engine's thread died")
        finally:
            self._bury()

    def _next(self) -> _Job | None:
        """Wait for a job; None once the engine is closed and nothing is left to do."""
        with self._wake:
            while not self._waiting:
                if self._closing:
                    return None
                self._wake.wait()
            self._running = self._waiting.popleft()
            return self._running

    def _carry_out(self, job: _Job) -> None:
        started = time.monotonic()
        generation: Generation | None = None
        try:
            reason: FinishReason | None = "abort" if job.aborted else None
            if reason is None:
                generation = Generation(self.model, job.request)
            while reason is None and generation is not None:
                reason = generation.step(lambda delta: self._tell(job, delta))
                self._drop_aborted()
                reason = "abort" if job.aborted and reason is None else reason
            assert reason is not None
            event: Event = _finished(reason, job, started, generation)
        except Exception as error:
            _log.exception("request %s failed", job.request.id)
            event = Failed(error)
        self._end(job, event)

    def _drop_aborted(self) -> None:
        """End requests that were aborted while they waited, without making them wait longer."""
        with self._wake:
            gone = [job for job in self._waiting if job.aborted]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._end(job, _finished("abort", job, time.monotonic(), None))

    def _end(self, job: _Job, event: Event) -> None:
        with self._wake:
            if self._running is job:
                self._running = None
            self._finished += 1
            if isinstance(event, Finished):
                self._prompt_tokens += event.usage.prompt_tokens
                self._completion_tokens += event.usage.completion_tokens
        self._tell(job, event)

    def _tell(self, job: _Job, event: Event) -> None:
        try:
            job.emit(event)
        except BaseException:  # a cancelled future's error is one, and concerns this request alone
            _log.exception("the receiver of request %s raised", job.request.id)
            job.aborted = True

    def _bury(self) -> None:
        """The thread ends: whoever is still waiting must hear of it."""
        with self._wake:
            self._dead = True
            left = [*([self._running] if self._running else []), *self._waiting]
            self._waiting.clear()
            self._running = None
        for job in left:
            self._tell(job, Failed(EngineDeadError("the engine stopped")))


def _finished(
    reason: FinishReason, job: _Job, started: float, generation: Generation | None
) -> Finished:
    now = time.monotonic()
    first = (generation.first_token_at if generation else None) or now
    written = generation.completion_tokens if generation else 0
    return Finished(
        reason,
        Usage(len(job.request.prompt_ids), written),
        Timings(
            1000 * (started - job.submitted_at), 1000 * (first - started), 1000 * (now - first)
        ),
    )
