"""Work that may take seconds: little of it at a time, and a bounded queue before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fastapi.concurrency import run_in_threadpool

from ..errors import CapacityError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Bounded:
    """At most `running` calls at a time, each in a thread, and `waiting` that wait for a turn."""

    def __init__(self, running: int, waiting: int, what: str) -> None:
        """`what` is done, in the words of an error."""
        self._slots = asyncio.Semaphore(running)
        self._most, self._waiting, self._what = waiting, 0, what

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Its result. Whoever is cancelled while waiting gives up the place.

        Raises:
            CapacityError: as many wait as may.
        """
        if self._waiting >= self._most:
            raise CapacityError(f"{self._waiting} requests wait for {self._what}")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        # A thread cannot be stopped, so its slot stays taken when nobody waits for it any more.
        working = asyncio.ensure_future(run_in_threadpool(work, *args, **kwargs))
        working.add_done_callback(self._ended)
        return await asyncio.shield(working)

    def _ended(self, working: asyncio.Future[_T]) -> None:
        self._slots.release()
        if not working.cancelled():
            working.exception()  # whoever was to hear of it may be gone
