"""Who does the work that may be done elsewhere: this process, or others.

A task is a function of the package and its arguments; what it gives depends on nothing else, so it
may be done anywhere, and again if whoever did it died.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Tasks(Protocol):
    """Takes work in, and gives it back when it is asked for."""

    @property
    def workers(self) -> int:
        """How many tasks are done at a time."""
        ...

    def share(self, value: T) -> T:
        """Something that stands for `value` among the arguments of several tasks."""
        ...

    def submit(self, function: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Have `function(*args)` done; the result is what the returned callable waits for."""
        ...


class Here:
    """This process, at once."""

    workers = 1

    def share(self, value: T) -> T:
        """The value."""
        return value

    def submit(self, function: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Done when this returns."""
        result = function(*args)
        return lambda: result
