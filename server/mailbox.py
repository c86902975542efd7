"""From the engines' threads to the event loop, with one call for many messages.

Waking a loop costs a system call and a turn of the interpreter's lock, which the engine's thread
would otherwise pay for every token of every answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Mailbox:
    """Calls what is put into it on the loop, in order. Made on the loop it serves."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._called = False

    def put(self, receive: Callable[..., None], *message: Any) -> None:
        """Have `receive(*message)` called soon. From any thread."""
        self._waiting.append((receive, message))
        if not self._called:
            self._called = True
            # A closed loop has no receivers left, and the engine must not suffer from that.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first, so that what is put from here on calls again
        while self._waiting:
            receive, message = self._waiting.popleft()
            receive(*message)
