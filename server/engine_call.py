"""The bridge between the event loop and the engine's thread.

Knows events and their order, not what clients are told about them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fastapi.concurrency import run_in_threadpool

from ..runtime.engine import Engine
from ..runtime.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
)
from .errors import unavailable


@dataclass(frozen=True)
class Output:
    """One prompt's whole answer."""

    text: str
    end: Finished


class EngineCall:
    """The prompts of one HTTP request in the engine: admitted together, ended together.

    Make it with `admit`. Whoever made it calls `close`, whatever happens.
    """

    def __init__(self, engine: Engine, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.size = 0
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: set[int] = set()

    @classmethod
    async def admit(
        cls,
        engine: Engine,
        prefix: str,
        tokenize: Callable[[], Sequence[Sequence[int]]],
        params: Callable[[int], SamplingParams],
    ) -> EngineCall:
        """Tokenize and submit all prompts, off the event loop; none stays if one is refused.

        `prefix` begins the call's id; `tokenize` gives the prompts' token ids, and `params` the
        parameters for a prompt of so many tokens.

        Raises:
            RequestError, CapacityError, EngineDeadError: see Engine.submit.
        """
        call = cls(engine, prefix)
        try:
            await run_in_threadpool(call._submit, tokenize, params)
        except BaseException:
            call.close()
            raise
        return call

    async def events(self, ping_s: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """Each event with its prompt's number, until all prompts have ended.

        After `ping_s` seconds of silence there is a None.

        Raises:
            Exception: the engine failed a prompt; the others are for `close` to end.
            ApiError: the engine was stopped meanwhile.
        """
        while self._open:
            try:
                index, event = await asyncio.wait_for(self._events.get(), ping_s)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                self._open.discard(index)
                raise event.error
            if isinstance(event, Finished):
                self._open.discard(index)
                if event.reason == "abort":
                    raise unavailable("the server stopped before the answer was whole", "aborted")
            yield index, event

    async def outputs(self) -> list[Output]:
        """Wait for all prompts; their answers in the prompts' order. Raises as `events` does."""
        texts: list[list[str]] = [[] for _ in range(self.size)]
        ends: dict[int, Finished] = {}
        async for item in self.events():
            match item:
                case (index, TextDelta(text=text)):
                    texts[index].append(text)
                case (index, Finished() as end):
                    ends[index] = end
        return [Output("".join(text), ends[index]) for index, text in enumerate(texts)]

    def close(self) -> None:
        """Abort whatever has not ended. Idempotent."""
        while self._open:
            self._engine.abort(self._request_id(self._open.pop()))

    def _submit(
        self,
        tokenize: Callable[[], Sequence[Sequence[int]]],
        params: Callable[[int], SamplingParams],
    ) -> None:
        for index, prompt in enumerate(tokenize()):
            request = GenerationRequest(self._request_id(index), tuple(prompt), params(len(prompt)))
            self._engine.submit(request, partial(self._emit, index))
            self._open.add(index)
            self.size += 1

    def _request_id(self, index: int) -> str:
        return f"{self.id}-{index}"

    def _emit(self, index: int, event: Event) -> None:
        """Runs on the engine's thread."""
        # A closed loop has no listeners left, and the engine must not suffer from that.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
