"""The engine: one thread owns the model; callers submit requests and are told of events.

Requests run side by side: every step computes a token for each answer that is being written, and
pieces of the prompts that wait to be read (scheduler.py). Whatever happens, each admitted request
gets exactly one last event, Finished or Failed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from ..errors import CapacityError, EngineDeadError, RequestError
from .answer import Answer
from .engine_settings import EngineSettings
from .memory import MemoryPlan
from .model import Model
from .paged import Memory
from .pages import PagePool
from .request import Event, Failed, Finished, FinishReason, GenerationRequest, Timings, Usage
from .scheduler import Scheduler
from .sequence import Emit
from .sequence import Sequence as Running
from .stats import Counts, EngineStats
from .step import Stepper

_log = logging.getLogger(__name__)


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

    def __init__(
        self,
        model: Model,
        settings: EngineSettings | None = None,
        turn: AbstractContextManager[object] | None = None,
        promised: int = 0,
    ) -> None:
        """Start the engine's thread. Engines that share a `turn`, a lock, compute in turns.

        `promised` are bytes of memory that other engines will take (`promised_bytes`).

        Raises:
            UsageError: the settings do not fit the model.
            CapacityError: there is no memory for keys and values.
        """
        self.model, self.settings = model, settings or EngineSettings()
        self.max_model_len = self.settings.context_of(model)
        pages = self.settings.pages_of(model)
        self.memory_plan = _memory_plan(model, self.settings, pages)
        self.memory_plan.check(promised)
        self._share = self.settings.share_prefixes
        pool = PagePool(pages, self._share)
        self._scheduler = Scheduler(pool, self.settings.max_running, self.settings.tokens_per_step)
        self._stepper = Stepper(model, _memory(model, pages))
        self._turn = turn or nullcontext()
        self._wake = threading.Condition()
        self._arrived: list[Running] = []
        self._in_flight: dict[str, Running] = {}
        self._count, self._orders = Counts(), 0
        self._closing = self._dead = False
        self._thread = threading.Thread(target=self._main, name="halfweave-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """Admit a request; returning means that it will be carried out.

        `emit` is called on the engine's thread for every event, must not block, and gets exactly
        one Finished or Failed, as the last. If it raises, the request is aborted.

        Raises:
            RequestError: the request cannot fit the model, or the id is in flight already; or more
                are submitted at once than may ever run and wait.
            CapacityError: the queue is full.
            EngineDeadError: the engine is closed, or its thread has died.
        """
        self.submit_all([(request, emit)])

    def submit_all(self, requests: Sequence[tuple[GenerationRequest, Emit]]) -> None:
        """Admit all of these, or none. Raises as `submit`."""
        for request, _ in requests:
            self._check_fits(request)
        with self._wake:
            if self._closing or self._dead:
                raise EngineDeadError("the engine is not running")
            self._check_room(len(requests))
            ids = [request.id for request, _ in requests]
            taken = [each for each in ids if each in self._in_flight or ids.count(each) > 1]
            if taken:
                raise RequestError(f"request id {taken[0]!r} is in flight already", "request_id")
            for request, emit in requests:
                self._admit(request, emit)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request with Finished("abort") within one step. Unknown ids are ignored."""
        with self._wake:
            sequence = self._in_flight.get(request_id)
            if sequence is not None:
                sequence.aborted = True
            self._wake.notify()

    def stream(self, request: GenerationRequest) -> EventStream:
        """Submit now, then iterate over the events; closing the stream aborts.

        Raises as `submit` does, before the first event is asked for.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        return EventStream(events, partial(self.abort, request.id))

    @property
    def alive(self) -> bool:
        """Whether requests are carried out, or can still be."""
        return not self._dead

    def stats(self) -> EngineStats:
        """Counters and queue lengths at this moment."""
        with self._wake:
            return self._count.view(self._scheduler, len(self._arrived), not self._dead)

    @property
    def promised_bytes(self) -> int:
        """Of its memory plan, what it has not taken yet.

        A CPU's keys and values become memory page by page; a GPU's are there from the start.
        """
        plan = self.memory_plan
        on_cpu = self.model.decoder.device.type == "cpu"
        return plan.wanted_bytes if on_cpu else plan.workspace_bytes

    def count_anew(self) -> None:
        """Forget what was counted so far: requests that no client sent."""
        with self._wake:
            self._count = Counts()

    def close(self, drain_s: float = 0.0) -> None:
        """Admit nothing more, let requests finish for up to `drain_s` seconds, abort the rest."""
        deadline = time.monotonic() + drain_s
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._wake:
            for sequence in self._in_flight.values():
                sequence.aborted = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_fits(self, request: GenerationRequest) -> None:
        count, longest, vocab = len(request.prompt_ids), self.max_model_len, self.model.spec.vocab
        if count + min(1, request.params.max_tokens) > longest:
            raise RequestError(
                f"the prompt has {count} tokens; the context has {longest}, "
                "one of them for the answer",
                param="prompt",
                code="context_length_exceeded",
            )
        if max(request.prompt_ids) >= vocab:
            raise RequestError(
                f"token id {max(request.prompt_ids)} is outside the vocabulary of {vocab}",
                param="prompt",
            )
        for name, ids in (
            ("stop_token_ids", request.params.stop_token_ids),
            ("logit_bias", [token for token, _ in request.params.logit_bias]),
        ):
            if ids and max(ids) >= vocab:
                raise RequestError(
                    f"{name}: token id {max(ids)} is outside the vocabulary of {vocab}", name
                )

    def _check_room(self, count: int) -> None:
        most = self.settings.max_running + self.settings.max_waiting
        if count > most:  # of no use to come back later
            raise RequestError(
                f"{count} answers are asked for at once, and there is room for {most}"
            )
        waiting = len(self._arrived) + len(self._scheduler.waiting)
        free = self.settings.max_running - len(self._scheduler.running)
        if waiting + count > self.settings.max_waiting + max(0, free):
            raise CapacityError(
                f"{waiting} requests are waiting, and at most {self.settings.max_waiting} may"
            )

    def _admit(self, request: GenerationRequest, emit: Emit) -> None:
        limit = min(request.params.max_tokens, self.max_model_len - len(request.prompt_ids))
        answer = Answer(request, self.model.tokenizer, limit)
        sequence = Running(request, emit, answer, order=self._orders)
        self._orders += 1
        self._arrived.append(sequence)
        self._in_flight[request.id] = sequence

    # ---- below: the engine's own thread

    def _main(self) -> None:
        try:
            while self._gather():
                self._step()
        except BaseException:
            _log.exception("the engine's thread died")
        finally:
            self._bury()

    def _gather(self) -> bool:
        """Take in what arrived, end what was aborted; waits for work. False once all is done."""
        with self._wake:
            while not self._in_flight:
                self._check_idle()
                if self._closing:
                    return False
                self._wake.wait()
            for sequence in self._arrived:
                self._scheduler.add(sequence)
            self._arrived.clear()
            gone = [each for each in self._in_flight.values() if each.aborted]
            late = self._late()
        for sequence in gone:
            self._finish(sequence, "abort")
        for sequence in late:
            if not sequence.aborted:
                waited = time.monotonic() - sequence.submitted_at
                self._fail(sequence, CapacityError(f"waited {waited:.1f} s without being begun"))
        return True

    def _late(self) -> list[Running]:
        limit = self.settings.queue_timeout_s
        if limit is None:
            return []
        now = time.monotonic()
        return [
            each
            for each in self._scheduler.waiting
            if each.started_at is None and now - each.submitted_at > limit
        ]

    def _step(self) -> None:
        with self._wake:  # so that nobody sees a sequence between two lists
            work = self._scheduler.plan()
            idle = not self._scheduler.running and not self._scheduler.waiting
        if not work:
            assert idle, "there is work, and none of it was planned"
            return
        with self._turn:
            result = self._stepper.run(work)
        self._count.steps[sum(each.count for each in work)] += 1
        self._count.completion_tokens += result.written
        for each in work:
            if each.sequence not in result.failed:
                each.sequence.advance(each.count, self._scheduler.pool)
        for sequence, reason in result.finished.items():
            self._finish(sequence, reason)
        for sequence, error in result.failed.items():
            _log.error("request %s failed", sequence.request.id, exc_info=error)
            self._fail(sequence, error)

    def _finish(self, sequence: Running, reason: FinishReason) -> None:
        self._end(sequence, _finished(reason, sequence))

    def _fail(self, sequence: Running, error: Exception) -> None:
        self._end(sequence, Failed(error))

    def _end(self, sequence: Running, event: Finished | Failed) -> None:
        with self._wake:
            self._scheduler.remove(sequence)
            del self._in_flight[sequence.request.id]
            begun = sequence.started_at is not None
            self._count.add(event, begun and sequence.request.params.prompt_logprobs is None)
        sequence.tell(event)

    def _check_idle(self) -> None:
        """Nobody runs, so no page is used. A page that got lost would be missed for ever."""
        pool = self._scheduler.pool
        try:
            pool.check_integrity()
            assert pool.used == 0, f"{pool.used} pages are used by nobody"
        except AssertionError:
            _log.exception("pages of keys and values were lost; starting with fresh ones")
            self._scheduler.pool = PagePool(pool.count, self._share)

    def _bury(self) -> None:
        """The thread ends: whoever is still waiting must hear of it."""
        with self._wake:
            self._dead = True
            left = list(self._in_flight.values())
            self._in_flight.clear()
            self._arrived.clear()
            self._scheduler.waiting.clear()
            self._scheduler.running.clear()
        for sequence in left:
            sequence.tell(Failed(EngineDeadError("the engine stopped")))


def _memory_plan(model: Model, settings: EngineSettings, pages: int) -> MemoryPlan:
    decoder, longest = model.decoder, settings.context_of(model)
    step = settings.tokens_per_step, settings.max_running, longest
    weights = model.checkpoint.weight_bytes
    plan = MemoryPlan.of(model.spec, weights, pages, decoder.page_bytes, step, decoder.device)
    workspace = plan.workspace_bytes + decoder.scratch_bytes
    return replace(plan, workspace_bytes=workspace, expanded_bytes=decoder.expanded_bytes)


def _memory(model: Model, pages: int) -> Memory:
    try:
        memory: Memory = model.decoder.new_memory(pages)
    except RuntimeError as error:  # torch's word for memory that there is not
        wanted = pages * model.decoder.page_bytes
        raise CapacityError(f"there is no memory for {wanted} bytes of keys and values") from error
    return memory


def _finished(reason: FinishReason, sequence: Running) -> Finished:
    now = time.monotonic()
    started = sequence.started_at or now
    first = sequence.answer.first_token_at or now
    usage = Usage(len(sequence.request.prompt_ids), len(sequence.answer.token_ids), sequence.cached)
    waited = started - sequence.submitted_at
    return Finished(
        reason, usage, Timings(1000 * waited, 1000 * (first - started), 1000 * (now - first))
    )
